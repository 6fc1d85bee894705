# SPDX-License-Identifier: Apache-2.0
"""Logs, catalogues, vocabularies, sequences and batches. Nothing here knows a model."""

from __future__ import annotations

from .card import data_card, render
from .collator import RankingCollator, SequenceCollator
from .demo import make_demo
from .filters import filter_interactions, k_core
from .interactions import describe_interactions, load_interactions, tied_timestamp_share
from .items import load_items
from .prepared import PreparedData, load_prepared, prepare
from .sequences import data_hash, split_by_ratio, split_by_time, split_leave_one_out
from .vocabulary import ItemVocabulary


__all__ = [
    "ItemVocabulary",
    "PreparedData",
    "RankingCollator",
    "SequenceCollator",
    "data_card",
    "data_hash",
    "describe_interactions",
    "filter_interactions",
    "k_core",
    "load_interactions",
    "load_items",
    "load_prepared",
    "make_demo",
    "prepare",
    "render",
    "split_by_ratio",
    "split_by_time",
    "split_leave_one_out",
    "tied_timestamp_share",
]
