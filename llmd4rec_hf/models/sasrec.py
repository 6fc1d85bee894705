# SPDX-License-Identifier: Apache-2.0
"""SASRec: a small causal transformer over item ids (Kang & McAuley, 2018), trained with the full softmax."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig

from ..errors import ConfigurationError
from .dropout import Dropout
from .recommender import RecommenderModel, check_length
from .weights import init_recommender_weights


class SASRecConfig(PreTrainedConfig):
    """
    Configuration of [`SASRecModel`].

    Args:
        num_items (`int`): number of items N; ids are 1..N and 0 is padding.
        hidden_size (`int`, *optional*, defaults to 64): width d of item vectors and hidden states.
        num_layers (`int`, *optional*, defaults to 2): transformer layers.
        num_heads (`int`, *optional*, defaults to 1): attention heads; must divide `hidden_size`.
        max_length (`int`, *optional*, defaults to 50): longest history the model reads, in items.
        dropout (`float`, *optional*, defaults to 0.5): dropout of embeddings, attention and feed-forward outputs. On
            sparse logs (a handful of events per user) 0.5 and more is best, on dense ones often less.
        intermediate_size (`int`, *optional*): width of the feed-forward layer; `hidden_size` by default.
    """

    model_type = "llmd4rec-sasrec"
    # Declared, because `max_length` would else be taken for a setting of text generation.
    max_length: int = 50

    def __init__(
        self,
        num_items: int = 1,
        hidden_size: int = 64,
        num_layers: int = 2,
        num_heads: int = 1,
        max_length: int = 50,
        dropout: float = 0.5,
        intermediate_size: int | None = None,
        **kwargs,
    ):
        if num_heads < 1 or hidden_size % num_heads:
            raise ConfigurationError(f"num_heads ({num_heads}) must divide hidden_size ({hidden_size}).")
        self.num_items = num_items
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.max_length = max_length
        self.dropout = dropout
        self.intermediate_size = intermediate_size or hidden_size
        super().__init__(**kwargs)


class SASRecModel(RecommenderModel):
    """
    Causal self-attention over item ids: learned positions counted from the start of the window, input and output item
    embeddings tied, inputs scaled by `sqrt(d)`. Scores are raw dot products, without bias. Its layers are those of the
    original implementation, see [`SASRecLayer`].

    Args:
        config ([`SASRecConfig`]): the configuration.
    """

    config_class = SASRecConfig

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(SASRecLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        init_recommender_weights(module)

    def item_matrix(self) -> torch.Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        # No mask is needed: padding is on the right, so causality alone keeps it from every item.
        check_length(item_ids, self.config.max_length)
        positions = torch.arange(item_ids.shape[1], device=item_ids.device)
        inputs = self.item_embedding(item_ids) * math.sqrt(self.config.hidden_size)
        states = self.dropout(inputs + self.position_embedding(positions))
        for layer in self.layers:
            states = layer(states)
        return self.final_norm(states)


class SASRecLayer(nn.Module):
    """
    Causal attention and a two-layer feed-forward network, each with a residual connection, arranged as in the original
    implementation: queries are normalised, keys and values are not, and what the feed-forward network adds to is its
    normalised input. Pre-LayerNorm learns half as fast from sparse logs.
    """

    def __init__(self, config: SASRecConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.attention_output = nn.Linear(size, size)
        self.feed_forward_norm = nn.LayerNorm(size)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, config.intermediate_size),
            nn.ReLU(),
            Dropout(config.dropout),
            nn.Linear(config.intermediate_size, size),
            Dropout(config.dropout),
        )

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = self.feed_forward_norm(states + self._attend(states))
        return states + self.feed_forward(states)

    def _attend(self, states: torch.Tensor) -> torch.Tensor:
        query = self._heads(self.query(self.attention_norm(states)))
        key, value = map(self._heads, self.key_value(states).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.attention_output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """From `(B, T, d)` to `(B, heads, T, d / heads)`."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
