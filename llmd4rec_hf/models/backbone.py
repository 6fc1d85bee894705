# SPDX-License-Identifier: Apache-2.0
"""The language model under a recommender: loading, quantisation, adapters. All that knows PEFT or bitsandbytes."""

from __future__ import annotations

import copy
import os

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from ..errors import ConfigurationError, first_line
from ..modes import evaluating
from .dropout import use_cheap_masks
from .llm_config import LLMRecommenderConfig
from .recommender import hub_arguments
from .weights import loading


ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# Of an adapter's settings, those that are no choice.
_SAYS_NOTHING = {
    f"adapter.{name}"
    for name in ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type")
}


def load_tokenizer(name: str | os.PathLike, **options) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, with an error that a user can act on."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_cannot_load("tokenizer", name, error)) from error


def load_backbone(
    name: str | os.PathLike,
    dtype: torch.dtype | str,
    quantization_config=None,
    trust_remote_code: bool = False,
    **kwargs,
) -> PreTrainedModel:
    """
    Load a decoder; an encoder that can act as a decoder is told to.

    Args:
        name (`str`): folder or Hub id.
        dtype (`torch.dtype` or `str`): of the weights that are not quantised.
        quantization_config (*optional*): e.g. a `BitsAndBytesConfig`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code from the model's repository.
        kwargs: further arguments of `AutoModel.from_pretrained`.

    Raises:
        ConfigurationError: there is no such model, it cannot be loaded, or it is a recommender.
    """
    if quantization_config is not None and torch.cuda.is_available():
        # Quantised weights cannot be moved from one device to another later: each process loads onto its own.
        kwargs.setdefault("device_map", {"": PartialState().local_process_index})
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_arguments(kwargs))
        if isinstance(config, LLMRecommenderConfig):
            raise ConfigurationError(
                f"{str(name)!r} is an LLM recommender already, not a language model to build one on: load it with "
                "RecommenderModel.from_pretrained, or name its base model."
            )
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        return AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    except ConfigurationError:  # says all itself, and is a ValueError too
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ConfigurationError(_cannot_load("language model", name, error)) from error


def load_base(source: str, config, name: str | os.PathLike | None, *args, **kwargs) -> PreTrainedModel:
    """
    The base model that a saved recommender lies upon, from `name` or from where its configuration says.

    Args:
        source (`str`): names the recommender in messages.
        config ([`LLMRecommenderConfig`]): its configuration.
        name (`str`, *optional*): folder or Hub id.
        args, kwargs: as for [`load_backbone`].

    Raises:
        ConfigurationError: there is no such model, or it cannot be loaded.
    """
    if name is None:
        name, place = config.backbone_name_or_path, {"revision": config.backbone_revision}
        place["subfolder"] = config.backbone_subfolder
        kwargs |= {key: value for key, value in place.items() if value is not None}
    try:
        return load_backbone(name, *args, **kwargs)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{source} needs its base model. {error} If it has moved, give its place, or the loaded model, as "
            "`backbone=`."
        ) from error


def build_backbone(settings: dict, dtype: torch.dtype | str, **kwargs) -> PreTrainedModel:
    """A backbone of a configuration as plain data, with random weights; `kwargs` as for `AutoModel.from_config`."""
    if dtype != "auto":
        kwargs["dtype"] = dtype
    return AutoModel.from_config(AutoConfig.for_model(**settings), **kwargs)


def ready_for_training(backbone: PreTrainedModel) -> PreTrainedModel:
    """Freeze quantised weights, bring the others to full precision, and keep evaluation from changing them."""
    if not getattr(backbone, "is_quantized", False):
        return backbone
    from peft import prepare_model_for_kbit_training

    backbone = prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    for module in backbone.modules():
        # bitsandbytes repacks 4-bit weights in the first evaluation on such CPUs, into a form that has no gradient and
        # loses precision: training after an evaluation would fail.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return backbone


def _cannot_load(what: str, name, error: Exception) -> str:
    reason = first_line(error)
    return f"Cannot load the {what} {str(name)!r}: give a folder or a Hub id of a transformers model ({reason})"


def plain_config(backbone: PreTrainedModel) -> dict:
    """The backbone's configuration as plain data, from which it can be built in floating point."""
    config = backbone.config.to_dict()
    config.pop("quantization_config", None)
    return config


def hidden_width(backbone: PreTrainedModel) -> int:
    """Width of the hidden states."""
    return backbone.config.get_text_config().hidden_size


def _vocabulary_size(backbone: PreTrainedModel) -> int:
    """Number of tokens; of the configuration where an adapter has put something else in the embedding's place."""
    size = getattr(backbone.get_input_embeddings(), "num_embeddings", None)
    return size or backbone.config.get_text_config().vocab_size


def embedding_scale(backbone: PreTrainedModel) -> float:
    """Root mean square of the token embeddings as the first layer sees them, which is not always as they are kept."""
    embedding = backbone.get_input_embeddings()
    tokens = torch.arange(min(1024, _vocabulary_size(backbone)), device=backbone.device)
    with torch.no_grad():
        return embedding(tokens).float().square().mean().sqrt().item()


def check_bare(backbone) -> None:
    """Raise if a given model is not a backbone without head and adapter; names pass."""
    if isinstance(backbone, (str, os.PathLike)):
        return
    # PEFT puts an adapter into a model in place; a second recommender on it would overwrite the first one's.
    has_adapter = hasattr(backbone, "peft_config")
    if not isinstance(backbone, PreTrainedModel) or backbone.base_model is not backbone or has_adapter:
        raise ConfigurationError(
            f"{type(backbone).__name__} is not a bare backbone: give a folder, a Hub id, or a loaded model without "
            "head (its `.base_model`) and without adapter, which goes into `peft_config`."
        )


@torch.no_grad()
def check_causal(backbone: PreTrainedModel) -> None:
    """Raise unless early states are blind to later tokens: else training would read the answers."""
    vocabulary_size = _vocabulary_size(backbone)
    tokens = torch.arange(1, 6, device=backbone.device).remainder(vocabulary_size)[None]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary_size
    with evaluating(backbone):
        first, second = (backbone(input_ids=ids).last_hidden_state[0, :-1].float() for ids in (tokens, changed))
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-3):
        raise ConfigurationError(
            f"{type(backbone).__name__} is not causal: a later token changes earlier states. Give a decoder, or an "
            "encoder whose configuration has `is_decoder`."
        )


def check_room(backbone: PreTrainedModel, positions: int) -> None:
    """Raise if an encoder made a decoder, whose positions are a table, has no room for the longest input."""
    room = getattr(backbone.config, "max_position_embeddings", None)
    if getattr(backbone.config, "is_decoder", False) and room is not None and positions > room:
        raise ConfigurationError(
            f"{type(backbone).__name__} has {room} positions, and prompt and longest history take {positions}: lower "
            "max_length."
        )


# --- adapters ----------------------------------------------------------------------------------------------------


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
