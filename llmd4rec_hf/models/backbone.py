# SPDX-License-Identifier: Apache-2.0
"""The language model under a recommender: loading, quantisation, and what is asked of it."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigurationError, first_line
from ..modes import evaluating
from .llm_config import LLMRecommenderConfig
from .weights import hub_arguments


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
