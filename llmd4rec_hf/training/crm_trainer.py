# SPDX-License-Identifier: Apache-2.0
"""Upward distillation: a CRM learns from the LLM."""

from __future__ import annotations

from ..distillation import ListedTeacherCache
from ..errors import ConfigurationError
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

    def _take_item_vectors(self, model, teacher) -> None:
        if self.settings.init_item_vectors:
            model.set_item_vectors(teacher.item_vectors(model.item_matrix().shape[1]))

    @property
    def _teacher_max_error(self) -> float:
        return self.settings.teacher_max_error
