# SPDX-License-Identifier: Apache-2.0
"""Mutual distillation between an LLM recommender and a conventional one, on the Hugging Face Trainer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .data import ItemVocabulary, SequenceCollator, load_interactions, split_by_time, split_leave_one_out
from .distillation import ListedScores, ListedTeacherCache, TeacherCache, distillation_loss, rank_weights
from .evaluation import ranking_metrics, target_ranks
from .models import (
    GRU4RecConfig,
    GRU4RecModel,
    LLMRecommender,
    LLMRecommenderConfig,
    RecommenderEnsemble,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
)
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .evaluation.hf_metric import RankingMetric
    from .mutual_distillation import MutualDistillation, MutualDistillationConfig
    from .training import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer

__all__ = [
    "CRMArguments",
    "CRMTrainer",
    "GRU4RecConfig",
    "GRU4RecModel",
    "ItemVocabulary",
    "LLMRecommender",
    "LLMRecommenderConfig",
    "ListedScores",
    "ListedTeacherCache",
    "MutualDistillArguments",
    "MutualDistillTrainer",
    "MutualDistillation",
    "MutualDistillationConfig",
    "RankingMetric",
    "RecommenderEnsemble",
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


# Imported on first use. `evaluate` and `Trainer` are slow to import, and who only serves a model needs neither, nor
# what `Trainer` brings along (PEFT, bitsandbytes).
_LAZY = {
    "CRMArguments": "training",
    "CRMTrainer": "training",
    "MutualDistillArguments": "training",
    "MutualDistillTrainer": "training",
    "MutualDistillation": "mutual_distillation",
    "MutualDistillationConfig": "mutual_distillation",
    "RankingMetric": "evaluation.hf_metric",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
