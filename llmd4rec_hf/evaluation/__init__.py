# SPDX-License-Identifier: Apache-2.0
"""Ranks, ranking metrics and the report of a run. Nothing here knows a model."""

from __future__ import annotations

from .ranking import ranking_metrics, score_targets, target_ranks


__all__ = ["ranking_metrics", "score_targets", "target_ranks"]
