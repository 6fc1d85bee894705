# SPDX-License-Identifier: Apache-2.0
"""GRU4Rec: a recurrent recommender over item ids (Hidasi et al., 2016), trained with the full softmax."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from .dropout import Dropout
from .recommender import RecommenderModel, check_length
from .weights import init_recommender_weights


class GRU4RecConfig(PreTrainedConfig):
    """
    Configuration of [`GRU4RecModel`].

    Args:
        num_items (`int`): number of items N; ids are 1..N and 0 is padding.
        hidden_size (`int`, *optional*, defaults to 64): width of item vectors and of the recurrent state.
        num_layers (`int`, *optional*, defaults to 1): recurrent layers.
        max_length (`int`, *optional*, defaults to 50): longest history the model reads, in items.
        dropout (`float`, *optional*, defaults to 0.5): dropout of the embeddings and of the output.
    """

    model_type = "llmd4rec-gru4rec"
    # Declared, because `max_length` would else be taken for a setting of text generation.
    max_length: int = 50

    def __init__(
        self,
        num_items: int = 1,
        hidden_size: int = 64,
        num_layers: int = 1,
        max_length: int = 50,
        dropout: float = 0.5,
        **kwargs,
    ):
        self.num_items = num_items
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.max_length = max_length
        self.dropout = dropout
        super().__init__(**kwargs)


class GRU4RecModel(RecommenderModel):
    """
    A GRU over item ids; input and output item embeddings are tied through a linear layer.

    Args:
        config ([`GRU4RecConfig`]): the configuration.
    """

    config_class = GRU4RecConfig

    def __init__(self, config: GRU4RecConfig):
        super().__init__(config)
        self.item_embedding = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.dropout = Dropout(config.dropout)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, config.num_layers, batch_first=True)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        init_recommender_weights(module)
        if isinstance(module, nn.GRU):
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def item_matrix(self) -> torch.Tensor:
        return self.item_embedding.weight

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        # A recurrence reads from the left, so padding on the right cannot reach an item.
        check_length(item_ids, self.config.max_length)
        states, _ = self.gru(self.dropout(self.item_embedding(item_ids)))
        return self.output(self.dropout(states))
