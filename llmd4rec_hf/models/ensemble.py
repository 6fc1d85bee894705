# SPDX-License-Identifier: Apache-2.0
"""Several recommenders as one: a teacher better than each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import ConfigurationError
from .recommender import RecommenderModel


class RecommenderEnsembleConfig(PreTrainedConfig):
    """
    Configuration of [`RecommenderEnsemble`], which makes it from its members' own.

    Args:
        num_items (`int`): number of items N, the same for all members.
        max_length (`int`): the longest history that all members can read, in items.
    """

    model_type = "llmd4rec-ensemble"
    # Declared, because `max_length` would else be taken for a setting of text generation.
    max_length: int = 50

    def __init__(self, num_items: int = 1, max_length: int = 50, **kwargs):
        self.num_items = num_items
        self.max_length = max_length
        super().__init__(**kwargs)


class RecommenderEnsemble(RecommenderModel):
    """
    The mean of several recommenders' scores, as one recommender: a teacher, or something to evaluate.

    Up to a constant per history, which no softmax and no ranking sees, it is the mean of their log-probabilities (a
    product of experts). Two models that came to their scores in different ways are together better than either of
    them, and one small student can learn much of that (Hinton et al., 2015). Hidden states and item matrices stand
    side by side: its scores are one product, and a [`TeacherCache`] holds them as it holds those of one model.

    It is not a model to deploy: inference runs all members. Save the members, or what has learned from them.

    Args:
        members (`Sequence[RecommenderModel]`): two models or more over the same items.

    Raises:
        ConfigurationError: fewer than two members, or members over different items.

    Example:

    ```python
    >>> teacher = RecommenderEnsemble([llm, crm])
    >>> trainer = CRMTrainer(student, args, train_dataset, eval_dataset, teacher=teacher)
    ```
    """

    config_class = RecommenderEnsembleConfig

    def __init__(self, members: Sequence[RecommenderModel]):
        members = list(members)
        _check(members)
        super().__init__(
            RecommenderEnsembleConfig(
                num_items=members[0].config.num_items,
                max_length=min(member.config.max_length for member in members),
            )
        )
        self.members = nn.ModuleList(members)
        # Its own alone: members stay in theirs.
        self.training = any(member.training for member in members)
        self.vocabulary = next((m.vocabulary for m in members if m.vocabulary is not None), None)

    def item_matrix(self) -> torch.Tensor:
        return torch.cat([member.item_matrix() for member in self.members], dim=1)

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        return self._side_by_side([member.encode(item_ids, attention_mask) for member in self.members])

    def encode_last(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        # Not from `encode`: members may have a shorter way to the last state.
        return self._side_by_side([member.encode_last(item_ids, attention_mask) for member in self.members])

    @staticmethod
    def _side_by_side(states: list[torch.Tensor]) -> torch.Tensor:
        """States whose scores by the item matrices side by side are the mean of all scores."""
        return torch.cat(states, dim=-1) / len(states)

    def content_hash(self) -> str:
        """SHA-256 over its members' own hashes."""
        return hashlib.sha256("".join(member.content_hash() for member in self.members).encode()).hexdigest()

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """Refused: an ensemble is made of models that are saved one by one."""
        raise ConfigurationError("An ensemble is not saved: save its members, or the student that learns from it.")


def _check(members: list[RecommenderModel]) -> None:
    if len(members) < 2:
        raise ConfigurationError(f"An ensemble has two members or more, got {len(members)}.")
    sizes = [member.config.num_items for member in members]
    if len(set(sizes)) > 1:
        raise ConfigurationError(f"The members of an ensemble score {sizes} items: build all over one vocabulary.")
    known = [member.vocabulary for member in members if member.vocabulary is not None]
    for vocabulary in known[1:]:
        if difference := known[0].first_difference(vocabulary):
            raise ConfigurationError(f"The members of an ensemble have different vocabularies: {difference}.")
