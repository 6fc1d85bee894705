# SPDX-License-Identifier: Apache-2.0
"""Mutual distillation between an LLM recommender and a conventional one, on the Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .data import ItemVocabulary, SequenceCollator, load_interactions, split_by_time, split_leave_one_out
from .distillation import TeacherCache, distillation_loss, rank_weights
from .evaluation import ranking_metrics, target_ranks
from .models import (
    GRU4RecConfig,
    GRU4RecModel,
    LLMRecommender,
    LLMRecommenderConfig,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
)
from .mutual_distillation import MutualDistillation, MutualDistillationConfig
from .training import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer


if TYPE_CHECKING:
    from .evaluation.hf_metric import RankingMetric

__version__ = "0.1.0"

__all__ = [
    "CRMArguments",
    "CRMTrainer",
    "GRU4RecConfig",
    "GRU4RecModel",
    "ItemVocabulary",
    "LLMRecommender",
    "LLMRecommenderConfig",
    "MutualDistillArguments",
    "MutualDistillTrainer",
    "MutualDistillation",
    "MutualDistillationConfig",
    "RankingMetric",
    "RecommenderModel",
    "SASRecConfig",
    "SASRecModel",
    "SequenceCollator",
    "TeacherCache",
    "distillation_loss",
    "load_interactions",
    "rank_weights",
    "ranking_metrics",
    "split_by_time",
    "split_leave_one_out",
    "target_ranks",
]


def __getattr__(name: str):
    # `evaluate` is slow to import and only this one name needs it.
    if name == "RankingMetric":
        from .evaluation.hf_metric import RankingMetric

        return RankingMetric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
