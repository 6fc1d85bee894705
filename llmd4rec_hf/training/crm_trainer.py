# SPDX-License-Identifier: Apache-2.0
"""Upward distillation: a CRM learns from the LLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from torch import nn

from ..distillation import ListedTeacherCache
from ..errors import ConfigurationError
from ..modes import changed
from .arguments import CRMArguments, CRMSettings
from .trainer import DistillationTrainer


class CRMTrainer(DistillationTrainer):
    """
    Trains a conventional recommender on the data and against the LLM's cached output distribution (the paper's
    `L_up`).

    Without a teacher it is a plain `Trainer` for the CRM. See [`DistillationTrainer`] for the arguments.

    Example:

    ```python
    >>> trainer = CRMTrainer(crm, CRMArguments("crm"), splits["train"], splits["validation"], teacher=llm)
    >>> trainer.train()
    ```
    """

    arguments_class = CRMArguments
    settings_class = CRMSettings

    def _check_teacher(self, teacher) -> None:
        super()._check_teacher(teacher)
        if self.settings.init_item_vectors and isinstance(teacher, ListedTeacherCache):
            raise ConfigurationError(f"{teacher!r} has no item vectors to begin with: set init_item_vectors=False.")

    def train(self, *args, **kwargs):
        """As in [`DistillationTrainer`]; `dropout_with_teacher` lasts as long as the training."""
        with ExitStack() as self._until_trained:
            return super().train(*args, **kwargs)

    def _prepare_student(self, model) -> None:
        super()._prepare_student(model)
        if self.settings.dropout_with_teacher is not None and self._teacher_cache is not None:
            for layer, name in _dropouts(model):
                other_rate = changed(layer, **{name: self.settings.dropout_with_teacher})
                self._until_trained.enter_context(other_rate)

    def _take_item_vectors(self, model, teacher) -> None:
        if self.settings.init_item_vectors:
            model.set_item_vectors(teacher.item_vectors(model.item_matrix().shape[1]))

    @property
    def _teacher_max_error(self) -> float:
        return self.settings.teacher_max_error


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """
    Where a model has the rate of a dropout, as layer and attribute: `p` of dropout layers, and `dropout` of layers
    that apply it themselves, as torch's attention and recurrent ones do.
    """
    for layer in model.modules():
        name = "p" if isinstance(layer, nn.Dropout) else "dropout"
        rate = getattr(layer, name, None)
        # Between recurrent layers there is none unless the model asks for it: its outputs have another.
        unused = isinstance(layer, nn.RNNBase) and rate == 0
        if isinstance(rate, (int, float)) and not isinstance(rate, bool) and not unused:
            yield layer, name
