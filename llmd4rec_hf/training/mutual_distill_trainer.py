# SPDX-License-Identifier: Apache-2.0
"""Downward distillation: the LLM learns from a CRM."""

from __future__ import annotations

from .arguments import MutualDistillArguments, MutualDistillSettings
from .trainer import DistillationTrainer


class MutualDistillTrainer(DistillationTrainer):
    """
    Trains an [`LLMRecommender`] on the data and against a CRM's cached output distribution (the paper's `L_down`),
    with the CRM's item vectors injected before training.

    Without a teacher it is a plain `Trainer` for the LLM. See [`DistillationTrainer`] for the arguments.

    Example:

    ```python
    >>> args = MutualDistillArguments("llm")
    >>> trainer = MutualDistillTrainer(llm, args, splits["train"], splits["validation"], teacher=crm)
    >>> trainer.train()
    ```
    """

    arguments_class = MutualDistillArguments
    settings_class = MutualDistillSettings

    def _prepare_student(self, model) -> None:
        # Of a new model in `Trainer`'s constructor nothing is known of the teacher yet; `train` comes later.
        if self._teacher_items is not None and self.settings.refresh_item_vectors:
            model.set_item_vectors(self._teacher_items)
