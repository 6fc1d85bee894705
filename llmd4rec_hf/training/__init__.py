# SPDX-License-Identifier: Apache-2.0
"""The trainers and their arguments."""

from __future__ import annotations

from .arguments import CRMArguments, DistillationArguments, MutualDistillArguments
from .crm_trainer import CRMTrainer
from .mutual_distill_trainer import MutualDistillTrainer
from .trainer import DistillationTrainer


# By the side of a run that they train.
TRAINERS: dict[str, type[DistillationTrainer]] = {"llm": MutualDistillTrainer, "crm": CRMTrainer}

__all__ = [
    "CRMArguments",
    "CRMTrainer",
    "DistillationArguments",
    "DistillationTrainer",
    "MutualDistillArguments",
    "MutualDistillTrainer",
]
