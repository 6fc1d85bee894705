# SPDX-License-Identifier: Apache-2.0
"""Downward distillation: the LLM learns from a CRM."""

from __future__ import annotations

from transformers.utils import logging

from ..distillation import ListedTeacherCache, TeacherCache
from ..errors import ConfigurationError
from ..models import LLMRecommender
from ..models.adapters import check_single_adapter
from .arguments import MutualDistillArguments, MutualDistillSettings
from .trainer import DistillationTrainer


logger = logging.get_logger(__name__)


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

    def _check_teacher(self, teacher) -> None:
        super()._check_teacher(teacher)
        if not self.settings.refresh_item_vectors:
            return
        if isinstance(teacher, ListedTeacherCache):
            raise ConfigurationError(f"{teacher!r} has no item vectors to inject: set refresh_item_vectors=False.")
        if isinstance(teacher, TeacherCache) and teacher.is_reduced:
            raise ConfigurationError(
                f"{teacher.directory} holds a narrowed teacher, without its own item vectors: build it with max_error "
                "0, or set refresh_item_vectors=False."
            )

    def train(self, *args, **kwargs):
        """
        As in [`DistillationTrainer`]; it warns of an LLM that cannot tell items apart, or is frozen, and refuses one
        with several adapters before its first checkpoint does.
        """
        if isinstance(self.model, LLMRecommender):
            self._warn_of_llm(self.model)
            if self.model.has_adapter:
                check_single_adapter(self.model.backbone)
        return super().train(*args, **kwargs)

    def _warn_of_llm(self, llm: LLMRecommender) -> None:
        injects = self.teacher is not None and self.settings.refresh_item_vectors
        if not injects and not llm.tells_items_apart:
            logger.warning(
                "The LLM has neither item vectors nor titles: all histories look the same to it. Call its "
                "set_item_vectors, or build it with item_texts."
            )
        if not any(parameter.requires_grad for parameter in llm.backbone.parameters()):
            logger.warning(
                "Nothing in the LLM's backbone is trained, only head and projections are: load a model with "
                "is_trainable=True to go on with its adapter."
            )

    def _take_item_vectors(self, model, teacher) -> None:
        if self.settings.refresh_item_vectors:
            model.set_item_vectors(teacher.item_matrix)
