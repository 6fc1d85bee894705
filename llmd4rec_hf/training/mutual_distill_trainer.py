# SPDX-License-Identifier: Apache-2.0
"""Downward distillation: the LLM learns from a CRM."""

from __future__ import annotations

from ..distillation import TeacherCache
from .arguments import MutualDistillArguments
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

    def _prepare_teacher(self) -> None:
        super()._prepare_teacher()
        if self.teacher is not None and self.args.refresh_item_vectors:
            cached = isinstance(self.teacher, TeacherCache)
            self.model.set_item_vectors(self.teacher.item_matrix if cached else self.teacher.item_matrix())
