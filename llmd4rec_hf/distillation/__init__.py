# SPDX-License-Identifier: Apache-2.0
"""The losses, the sample weights and the teacher caches. Nothing here knows a model class or a Trainer."""

from __future__ import annotations

from .listed_scores import ListedScores
from .listed_teacher import ListedTeacherCache
from .loss import DistillationLoss, distillation_loss
from .sampled import draw_negatives, sampled_distillation_loss
from .teacher_cache import TeacherCache
from .weighting import TargetOutcome, confidence_weights, rank_weights, register_weighting


__all__ = [
    "DistillationLoss",
    "ListedScores",
    "ListedTeacherCache",
    "TargetOutcome",
    "TeacherCache",
    "confidence_weights",
    "distillation_loss",
    "draw_negatives",
    "rank_weights",
    "register_weighting",
    "sampled_distillation_loss",
]
