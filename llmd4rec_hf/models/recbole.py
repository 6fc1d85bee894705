# SPDX-License-Identifier: Apache-2.0
"""SASRec as RecBole builds it, so that a model trained there can teach here, or go on being trained."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig

from ..data import ItemVocabulary
from ..errors import ConfigurationError, DataError
from .recommender import RecommenderModel, check_length
from .weights import init_recommender_weights


ACTIVATIONS = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}
PADDING_TOKEN = "[PAD]"
_HOW_TO_SAVE = 'write it where RecBole is installed: torch.save(model.state_dict(), "sasrec.pt")'


class RecBoleSASRecConfig(PreTrainedConfig):
    """
    Configuration of [`RecBoleSASRecModel`]; the defaults are RecBole's.

    Args:
        num_items (`int`): number of items N; ids are 1..N and 0 is padding.
        hidden_size (`int`, *optional*, defaults to 64): width d of item vectors and hidden states.
        intermediate_size (`int`, *optional*, defaults to 256): width of the feed-forward layers (`inner_size`).
        num_layers (`int`, *optional*, defaults to 2): transformer layers (`n_layers`).
        num_heads (`int`, *optional*, defaults to 2): attention heads (`n_heads`).
        max_length (`int`, *optional*, defaults to 50): longest history (`MAX_ITEM_LIST_LENGTH`).
        dropout (`float`, *optional*, defaults to 0.5): everywhere (`hidden_dropout_prob`, `attn_dropout_prob`).
        hidden_act (`str`, *optional*, defaults to `"gelu"`): `"gelu"` or `"relu"`.
        layer_norm_eps (`float`, *optional*, defaults to 1e-12): of the layer norms.
    """

    model_type = "llmd4rec-recbole-sasrec"
    # Declared, because `max_length` would else be taken for a setting of text generation.
    max_length: int = 50

    def __init__(
        self,
        num_items: int = 1,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_layers: int = 2,
        num_heads: int = 2,
        max_length: int = 50,
        dropout: float = 0.5,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        **kwargs,
    ):
        if hidden_size % num_heads:
            raise ConfigurationError(f"num_heads ({num_heads}) must divide hidden_size ({hidden_size}).")
        if hidden_act not in ACTIVATIONS:
            raise ConfigurationError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {hidden_act!r}.")
        self.num_items = num_items
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.max_length = max_length
        self.dropout = dropout
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        super().__init__(**kwargs)


class RecBoleSASRecModel(RecommenderModel):
    """
    RecBole's SASRec: post-LayerNorm as in BERT, inputs normalised and not scaled, item embeddings tied. Its weights do
    not fit into [`SASRecModel`], whose layers are the original ones.

    Args:
        config ([`RecBoleSASRecConfig`]): the configuration.
    """

    config_class = RecBoleSASRecConfig

    def __init__(self, config: RecBoleSASRecConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.input_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_heads,
            config.intermediate_size,
            config.dropout,
            ACTIVATIONS[config.hidden_act],
            config.layer_norm_eps,
            batch_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        draw = partial(nn.init.normal_, std=0.02)
        init_recommender_weights(module, draw)
        if isinstance(module, nn.MultiheadAttention):
            draw(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)

    def item_matrix(self) -> torch.Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        length = item_ids.shape[1]
        check_length(item_ids, self.config.max_length)
        positions = self.position_embedding(torch.arange(length, device=item_ids.device))
        states = self.dropout(self.input_norm(self.item_embedding(item_ids) + positions))
        future = torch.ones(length, length, dtype=torch.bool, device=item_ids.device).triu(1)
        return self.encoder(states, mask=future)

    @classmethod
    def from_recbole(
        cls,
        weights: str | os.PathLike,
        item_tokens: Sequence[str],
        vocabulary: ItemVocabulary,
        *,
        num_heads: int = 2,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        dropout: float = 0.5,
    ) -> RecBoleSASRecModel:
        """
        Take over a SASRec that RecBole has trained; everything but the arguments here is read off the weights.

        RecBole's own checkpoints are pickles that hold more than tensors, so they are not read: save the state dict.

        Args:
            weights (`str`): a state dict, saved by `torch.save` or as safetensors.
            item_tokens (`Sequence[str]`): RecBole's `dataset.field2id_token["item_id"]`, padding included.
            vocabulary ([`ItemVocabulary`]): the items here. All must be among the tokens; their order may differ.
            num_heads, hidden_act, layer_norm_eps, dropout: as [`RecBoleSASRecConfig`] has them.

        Raises:
            ConfigurationError: a file that is not such a state dict.
            DataError: tokens that do not fit the weights, or lack an item of the vocabulary.
        """
        state = _read_state(weights)
        try:
            items, positions = state["item_embedding.weight"], state["position_embedding.weight"]
            layers = {name.split(".")[2] for name in state if name.startswith("trm_encoder.layer.")}
            inner = state["trm_encoder.layer.0.feed_forward.dense_1.weight"].shape[0]
            renamed = _renamed(state, len(layers))
        except KeyError as error:
            raise ConfigurationError(f"{weights} holds no SASRec of RecBole: {error} is missing.") from error
        model = cls(
            RecBoleSASRecConfig(
                num_items=len(vocabulary),
                hidden_size=items.shape[1],
                intermediate_size=inner,
                num_layers=len(layers),
                num_heads=num_heads,
                max_length=positions.shape[0],
                dropout=dropout,
                hidden_act=hidden_act,
                layer_norm_eps=layer_norm_eps,
            )
        )
        renamed["item_embedding.weight"] = items[_rows_of(vocabulary, item_tokens, items.shape[0])]
        try:
            model.load_state_dict(renamed)
        except RuntimeError as error:
            raise ConfigurationError(f"{weights} holds no SASRec of RecBole whose sizes fit: {error}") from error
        model.vocabulary = vocabulary
        return model.eval()


def _read_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigurationError(f"{path} is not a plain state dict; {_HOW_TO_SAVE}") from error
    if not isinstance(state, dict):
        raise ConfigurationError(f"{path} is not a state dict but a {type(state).__name__}; {_HOW_TO_SAVE}")
    return state


def _rows_of(vocabulary: ItemVocabulary, item_tokens: Sequence[str], num_rows: int) -> list[int]:
    """Where each item of the vocabulary stands in RecBole's table, padding first."""
    tokens = [str(token) for token in item_tokens]
    if len(tokens) != num_rows or tokens[0] != PADDING_TOKEN:
        raise DataError(
            f"{len(tokens)} item tokens, the first is {tokens[0] if tokens else None!r}, for a table of {num_rows} "
            'rows: give dataset.field2id_token["item_id"] as it is, padding included.'
        )
    place = {token: row for row, token in enumerate(tokens)}
    missing = [item for item in vocabulary.item_ids if str(item) not in place]
    if missing:
        raise DataError(f"{len(missing)} items of the vocabulary are not in RecBole's model, first {missing[0]!r}.")
    return [0, *(place[str(item)] for item in vocabulary.item_ids)]


def _renamed(state: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """RecBole's names to those of torch's own transformer layer."""
    ours = {name: state[name] for name in ("item_embedding.weight", "position_embedding.weight")}
    for part in ("weight", "bias"):
        ours[f"input_norm.{part}"] = state[f"LayerNorm.{part}"]
        for number in range(num_layers):
            theirs, layer = f"trm_encoder.layer.{number}", f"encoder.layers.{number}"
            attention, feed_forward = f"{theirs}.multi_head_attention", f"{theirs}.feed_forward"
            ours[f"{layer}.self_attn.in_proj_{part}"] = torch.cat(
                [state[f"{attention}.{name}.{part}"] for name in ("query", "key", "value")]
            )
            for name, source in {
                "self_attn.out_proj": f"{attention}.dense",
                "norm1": f"{attention}.LayerNorm",
                "linear1": f"{feed_forward}.dense_1",
                "linear2": f"{feed_forward}.dense_2",
                "norm2": f"{feed_forward}.LayerNorm",
            }.items():
                ours[f"{layer}.{name}.{part}"] = state[f"{source}.{part}"]
    return ours
