# SPDX-License-Identifier: Apache-2.0
"""Upward distillation: a CRM learns from the LLM."""

from __future__ import annotations

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

    def _prepare_student(self, model) -> None:
        # Of a new model in `Trainer`'s constructor nothing is known of the teacher yet; `train` comes later.
        if self._teacher_cache is not None and self.settings.init_item_vectors:
            model.set_item_vectors(self._teacher_cache.item_vectors(model.item_matrix().shape[1]))

    @property
    def _teacher_max_error(self) -> float:
        return self.settings.teacher_max_error
