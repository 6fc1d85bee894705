# SPDX-License-Identifier: Apache-2.0
"""The adapter on a recommender's language model, any of PEFT's: adding, saving, loading and merging it."""

from __future__ import annotations

import copy
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..errors import ConfigurationError
from .backbone import check_causal
from .dropout import use_cheap_masks
from .weights import loading


ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Of an adapter's settings, those that are no choice.
_SAYS_NOTHING = {
    f"adapter.{name}"
    for name in ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
}


def add_adapter(backbone: PreTrainedModel, peft_config):
    """
    Freeze a backbone and give it a new adapter.

    Args:
        backbone ([`~transformers.PreTrainedModel`]): the bare backbone.
        peft_config ([`~peft.PeftConfig`]): LoRA (with DoRA, rsLoRA and the like) without `target_modules` gets all
            linear layers, as in QLoRA; other kinds PEFT's own choice for the architecture.

    Returns:
        [`~peft.PeftModel`]

    Raises:
        ConfigurationError: no such configuration, PEFT finds nothing to adapt, or the kind works by virtual tokens or
            asks for more inputs.
    """
    from peft import LoraConfig, PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigurationError(
            f"peft_config must be a configuration of PEFT, e.g. LoraConfig(), got {type(peft_config).__name__}."
        )
    if peft_config.is_prompt_learning:
        raise ConfigurationError(
            f"{type(peft_config).__name__} adds virtual tokens, and the prompt is this model's own: give an adapter "
            "of the layers, e.g. LoraConfig()."
        )
    peft_config = copy.copy(peft_config)  # PEFT writes into it what it found in this backbone
    if peft_config.task_type != "FEATURE_EXTRACTION":  # those of models with a head, which PEFT would look for
        peft_config.task_type = None
    if str(getattr(peft_config, "init_lora_weights", "")).startswith("pissa_niter"):
        raise ConfigurationError(
            f"init_lora_weights={peft_config.init_lora_weights!r} changes the base weights at random, which are not "
            "saved: give 'pissa', which changes them in the same way each time."
        )
    if isinstance(peft_config, LoraConfig) and peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    try:
        adapted = get_peft_model(backbone, peft_config)
        use_cheap_masks(adapted)
        check_causal(adapted)  # some kinds ask for inputs of their own, and say so only now
        return adapted
    except (AttributeError, ValueError) as error:
        raise ConfigurationError(f"PEFT cannot adapt {type(backbone).__name__}: {error}") from error


def load_adapter(backbone: PreTrainedModel, source: str, is_trainable: bool, **hub_kwargs):
    """The adapter in a folder or a Hub repository, on the backbone that it was trained on."""
    from peft import PeftModel

    with loading(source):
        weights = cached_file(source, ADAPTER_WEIGHTS_NAME, **hub_kwargs)
        try:
            adapted = PeftModel.from_pretrained(backbone, os.path.dirname(weights), is_trainable=is_trainable)
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(f"The adapter does not fit this {type(backbone).__name__}: {error}") from error
    use_cheap_masks(adapted)
    return adapted


def adapter_state(backbone, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of an adapted backbone's state those tensors that are the adapter's, under PEFT's own names."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(backbone, state_dict=state_dict)


def check_single_adapter(backbone) -> None:
    """Raise for several adapters, of which one would be saved."""
    if len(backbone.peft_config) > 1:
        raise ConfigurationError(
            f"The backbone carries the adapters {list(backbone.peft_config)}, and one is saved: merge or delete the "
            "others."
        )


def save_adapter(backbone, tensors: dict[str, torch.Tensor], directory: str | os.PathLike) -> None:
    """Write PEFT's two files, which PEFT alone can load onto the bare backbone."""
    # Not PeftModel.save_pretrained: it would also write a model card that claims the whole repository for PEFT.
    check_single_adapter(backbone)
    os.makedirs(directory, exist_ok=True)
    # Some kinds share what lies in memory once, and a file may not.
    tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, os.path.join(directory, ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
    peft_config = copy.copy(backbone.peft_config["default"])
    peft_config.inference_mode = True
    base = type(backbone.get_base_model())
    peft_config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    peft_config.save_pretrained(directory)


def load_adapter_weights(backbone, directory: str | os.PathLike) -> None:
    """Bring saved adapter weights into an adapter of the same kind, in place."""
    from peft import set_peft_model_state_dict

    try:
        set_peft_model_state_dict(backbone, load_file(os.path.join(directory, ADAPTER_WEIGHTS_NAME)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"The adapter in {directory} does not fit this model: {error}") from error


def merge_adapter(backbone) -> PreTrainedModel:
    """
    The bare backbone with the adapter added to its weights. Quantised weights are turned back into floating point
    first: added to them, the adapter would be rounded to as few bits as they have.

    Raises:
        ConfigurationError: an adapter that those weights cannot take up.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    _check_mergeable(backbone)
    if not getattr(backbone.get_base_model(), "is_quantized", False):
        return backbone.merge_and_unload()
    peft_config, tensors = backbone.peft_config["default"], get_peft_model_state_dict(backbone)
    backbone = get_peft_model(backbone.unload().dequantize(), peft_config)
    set_peft_model_state_dict(backbone, tensors)
    return backbone.merge_and_unload()


def _check_mergeable(backbone) -> None:
    """PEFT says so too late, when some layers are merged already, or not at all."""
    peft_config, reason = backbone.peft_config["default"], None
    if not hasattr(backbone, "merge_and_unload"):
        reason = f"one of the kind {peft_config.peft_type.value} is no part of a layer"
    elif getattr(peft_config, "layer_replication", None):
        reason = "with layer_replication several layers share their weights"
    elif any(_has_bias_of_its_own(layer) for layer in backbone.modules()):
        reason = "lora_bias asks for layers that have a bias"
    if reason is not None:
        raise ConfigurationError(f"This adapter cannot be merged: {reason}. Keep it; it is saved with the model.")


def _has_bias_of_its_own(layer) -> bool:
    adds_bias = getattr(layer, "lora_bias", None) or {}
    return adds_bias.get("default", False) and getattr(layer.get_base_layer(), "bias", None) is None


def added_settings(backbone) -> dict:
    """What an adapter and a quantisation were asked for, flat and as JSON holds it; nothing where there is neither."""
    found = {}
    if hasattr(backbone, "peft_config"):
        found |= {f"adapter.{name}": value for name, value in backbone.peft_config["default"].to_dict().items()}
    quantization = getattr(backbone.config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, dict) else quantization.to_dict()
        found |= {f"quantization.{name}": value for name, value in settings.items()}
    said = {name: value for name, value in found.items() if value and name not in _SAYS_NOTHING}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in said.items()}
