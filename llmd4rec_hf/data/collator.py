# SPDX-License-Identifier: Apache-2.0
"""From rows of item ids to padded tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from ..errors import ConfigurationError, DataError


@dataclass
class SequenceCollator:
    """
    Turns rows into a batch: inputs are all items but the last, labels all items but the first.

    A row `[a, b, c, d]` gives the inputs `[a, b, c]` and the labels `[b, c, d]`. Of a longer history the newest
    `max_length` positions stay. Padding comes on the right.

    Args:
        max_length (`int`, *optional*, defaults to 50):
            Most input positions of a row, in items.
        pad_to_multiple_of (`int`, *optional*):
            Rounds the batch's width up to a multiple of this, which some accelerators like.

    Call it with a list of dicts holding `item_ids` (list or array, two items or more, ids from 1) and, optionally,
    `row_id`; other keys are left out. It returns `item_ids` (B, T) padded with 0, `attention_mask` (B, T), `labels`
    (B, T) padded with -100, and `row_id` (B,) where rows carry one; all of them `int64`.

    Raises:
        `DataError`: A row has fewer than two items or an id below 1.
    """

    max_length: int = 50
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigurationError(f"max_length={self.max_length}; it must be 1 or more")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ConfigurationError(f"pad_to_multiple_of={self.pad_to_multiple_of}; it must be 1 or more")

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if not features:
            raise DataError("cannot collate a batch of no rows")
        newest = slice(-self.max_length - 1, None)
        rows = [feature["item_ids"][newest] for feature in features]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        if lengths.min() < 2:
            raise DataError(f"{_name(features, int(lengths.argmin()))} has fewer than 2 items: nothing to predict")
        items = _flat(rows, int(lengths.sum()))
        ends = np.cumsum(lengths)
        if items.min() < 1:
            row = int(np.searchsorted(ends, items.argmin(), side="right"))
            raise DataError(f"{_name(features, row)} holds the id {items.min()}; internal ids start at 1")
        width = int(lengths.max()) - 1
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        real = np.arange(width) < (lengths - 1)[:, None]
        inputs = np.zeros(real.shape, np.int64)
        inputs[real] = np.delete(items, ends - 1)
        labels = np.full(real.shape, -100, np.int64)
        labels[real] = np.delete(items, ends - lengths)
        batch = {"item_ids": inputs, "attention_mask": real.astype(np.int64), "labels": labels}
        if "row_id" in features[0]:
            batch["row_id"] = np.fromiter((feature["row_id"] for feature in features), np.int64, len(features))
        return {name: torch.from_numpy(array) for name, array in batch.items()}


@dataclass
class RankingCollator:
    """
    Adds what ranking needs to the batches of another collator: `seen` (B, S), every item of each row but the last,
    padded with 0. A model reads its newest items alone; those that are out of its sight have been chosen all the same.

    Args:
        collator (`Callable`):
            Makes the rest of the batch, as [`SequenceCollator`] does.
    """

    collator: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]]

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [feature["item_ids"][:-1] for feature in features]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        seen = np.zeros((len(rows), int(lengths.max())), np.int64)
        seen[np.arange(seen.shape[1]) < lengths[:, None]] = _flat(rows, int(lengths.sum()))
        return {**self.collator(features), "seen": torch.from_numpy(seen)}


def _flat(rows: list, count: int) -> np.ndarray:
    if isinstance(rows[0], list):
        return np.fromiter(chain.from_iterable(rows), np.int64, count)
    return np.concatenate([np.asarray(row) for row in rows]).astype(np.int64)


def _name(features: Sequence[dict[str, Any]], index: int) -> str:
    row_id = features[index].get("row_id")
    return f"row {index} of the batch" + ("" if row_id is None else f" (row_id {int(row_id)})")
