# SPDX-License-Identifier: Apache-2.0
"""Logs, catalogues, vocabularies, sequences and batches. Nothing here knows a model."""

from __future__ import annotations

from .collator import RankingCollator, SequenceCollator
from .demo import make_demo
from .interactions import describe_interactions, k_core, load_interactions, load_items, tied_timestamp_share
from .sequences import data_hash, split_by_time, split_leave_one_out
from .vocabulary import ItemVocabulary


__all__ = [
    "ItemVocabulary",
    "RankingCollator",
    "SequenceCollator",
    "data_hash",
    "describe_interactions",
    "k_core",
    "load_interactions",
    "load_items",
    "make_demo",
    "split_by_time",
    "split_leave_one_out",
    "tied_timestamp_share",
]
