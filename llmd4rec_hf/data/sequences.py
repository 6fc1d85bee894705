# SPDX-License-Identifier: Apache-2.0
"""From a log to one sequence per user, split for training, validation and test."""

from __future__ import annotations

import hashlib
import logging

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError
from .arrow import to_dataset
from .columns import moment
from .interactions import log_table, sort_log
from .vocabulary import ItemVocabulary


logger = logging.getLogger(__name__)


def split_leave_one_out(
    interactions: datasets.Dataset, vocabulary: ItemVocabulary, *, min_length: int = 3
) -> datasets.DatasetDict:
    """
    Leaves each user's last item for the test and the one before for validation.

    In every split the **last** element of `item_ids` is the newest target; the collator shifts. For a user with items
    `s` in time order, train holds `s[:-2]`, validation `s[:-1]` and test `s`.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.
        vocabulary ([`ItemVocabulary`]):
            Gives the internal ids; must know every item of the log.
        min_length (`int`, *optional*, defaults to 3):
            Users with fewer interactions are left out.

    Returns:
        `datasets.DatasetDict`: `train`, `validation` and `test` with columns `user_id`, `item_ids` (list of `int32`),
        `length` (of `item_ids`) and `row_id`, the user's index, equal in all three. A user of exactly three
        interactions has no pair to train on and appears in validation and test only.

    Raises:
        `DataError`: An item is unknown to the vocabulary, or no user is left.
    """
    if min_length < 3:
        raise DataError(f"min_length={min_length}: a history, a validation and a test item need at least 3")
    _, user, users, items = _sorted_items(interactions, vocabulary)
    lengths = np.bincount(user, minlength=len(users))
    kept = lengths >= min_length
    if not kept.any():
        raise DataError(f"no user has {min_length} interactions; lower k_core or check the log")
    if not kept.all():
        logger.warning("%d of %d users left out: fewer than %d items", (~kept).sum(), len(kept), min_length)
    ends = {"train": lengths - 2, "validation": lengths - 1, "test": lengths}
    return _splits(users, user, items, {name: np.where(kept, end, 0) for name, end in ends.items()})


def split_by_time(
    interactions: datasets.Dataset,
    vocabulary: ItemVocabulary,
    *,
    validation_time: float | str | None = None,
    test_time: float | str | None = None,
    validation_quantile: float = 0.8,
    test_quantile: float = 0.9,
) -> datasets.DatasetDict:
    """
    Splits every user at the same two moments, so that no model is trained on what happened after its targets.

    Train holds what happened before `validation_time`. A validation row is a user's whole history before
    `validation_time` and, as its target, the first item at or after it (and before `test_time`); a test row is the
    history before `test_time` and the first item at or after it. One target per user keeps users equal in the metrics.
    A user appears in a split only with a history and a target there.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns, from a source with real timestamps.
        vocabulary ([`ItemVocabulary`]):
            Gives the internal ids; must know every item of the log, also those first met after the boundaries.
        validation_time (`float` or `str`, *optional*):
            First moment of the validation period, in seconds or as an ISO date; by default the time that a share
            `validation_quantile` of the interactions lies before.
        test_time (`float` or `str`, *optional*):
            First moment of the test period; by default by `test_quantile`.
        validation_quantile (`float`, *optional*, defaults to 0.8):
            Used where `validation_time` is not given.
        test_quantile (`float`, *optional*, defaults to 0.9):
            Used where `test_time` is not given.

    Returns:
        `datasets.DatasetDict`: The columns of [`split_leave_one_out`].

    Raises:
        `ConfigurationError`: A time is none.
        `DataError`: The log has no clock, the boundaries are out of range or order, or a split is empty.
    """
    if not (0 <= validation_quantile <= 1 and 0 <= test_quantile <= 1):
        raise DataError(f"quantiles {validation_quantile} and {test_quantile}; they must lie between 0 and 1")
    table, user, users, items = _sorted_items(interactions, vocabulary)
    if "position" in table.column_names:
        raise DataError("the log has positions, not times, and users cannot be compared; use split_leave_one_out()")
    time = table["timestamp"].to_numpy()
    first = _boundary(time, validation_time, "validation_time", validation_quantile)
    second = _boundary(time, test_time, "test_time", test_quantile)
    if not first < second:
        raise DataError(f"validation starts at {first} and test at {second}; validation must start first")
    before_first, before_second, all_counts = (
        np.bincount(user[mask], minlength=len(users)) for mask in (time < first, time < second, time >= 0)
    )
    # One more item than the history is the target; rows are in time order, so it is the first one of the period.
    validation = np.where((before_first > 0) & (before_second > before_first), before_first + 1, 0)
    test = np.where((before_second > 0) & (all_counts > before_second), before_second + 1, 0)
    ends = {"train": before_first, "validation": validation, "test": test}
    splits = _splits(users, user, items, ends)
    for name, split in splits.items():
        if len(split) == 0:
            raise DataError(f"no user falls into {name} with validation at {first} and test at {second}; move them")
    logger.info("validation from %s, test from %s: %s rows", first, second, {k: len(v) for k, v in splits.items()})
    return splits


def _boundary(time: np.ndarray, given: float | str | None, name: str, quantile: float) -> float:
    return np.quantile(time, quantile, method="lower").item() if given is None else moment(given, name)


def split_by_ratio(
    interactions: datasets.Dataset,
    vocabulary: ItemVocabulary,
    *,
    validation_ratio: float = 0.1,
    test_ratio: float = 0.1,
) -> datasets.DatasetDict:
    """
    Leaves the last share of each user's items for the test, and the share before for validation.

    Train holds what comes before both shares. A validation row is that and, as its target, the first item of the
    validation share; a test row is everything before the test share and its first item. One target per user keeps
    users equal in the metrics.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.
        vocabulary ([`ItemVocabulary`]):
            Gives the internal ids; must know every item of the log.
        validation_ratio, test_ratio (`float`, *optional*, defaults to 0.1):
            The shares; each is one item at least.

    Returns:
        `datasets.DatasetDict`: The columns of [`split_leave_one_out`]; users with fewer than three items are left out.

    Raises:
        `DataError`: The shares leave nothing for training, an item is unknown, or no user has three items.
    """
    if not (validation_ratio >= 0 and test_ratio >= 0 and validation_ratio + test_ratio < 1):  # nor may one be NaN
        raise DataError(f"ratios {validation_ratio} and {test_ratio}; they must be 0 or more and leave some for train")
    _, user, users, items = _sorted_items(interactions, vocabulary)
    lengths = np.bincount(user, minlength=len(users))
    kept = lengths >= 3
    if not kept.any():
        raise DataError("no user has 3 interactions; lower k_core or check the log")
    test_share, validation_share = (
        np.maximum(np.floor(lengths * ratio + 0.5).astype(np.int64), 1) for ratio in (test_ratio, validation_ratio)
    )
    before_test = np.maximum(lengths - test_share, 2)
    before_validation = np.maximum(before_test - validation_share, 1)
    ends = {"train": before_validation, "validation": before_validation + 1, "test": before_test + 1}
    return _splits(users, user, items, {name: np.where(kept, end, 0) for name, end in ends.items()})


def data_hash(dataset: datasets.Dataset) -> str:
    """
    sha256 of `row_id` and `item_ids`, in row order; equal for equal content, however it is chunked or sliced.

    Args:
        dataset (`datasets.Dataset`):
            One split.
    """
    digests = [hashlib.sha256() for _ in range(3)]
    for batch in dataset.select_columns(["row_id", "item_ids"]).with_format("arrow").iter(batch_size=1 << 16):
        for chunk in batch["item_ids"].chunks:
            digests[0].update(chunk.value_lengths().cast(pa.int64()).to_numpy().data)
            digests[1].update(chunk.flatten().cast(pa.int64()).to_numpy().data)
        digests[2].update(batch["row_id"].cast(pa.int64()).to_numpy().data)
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()


def item_id_range(dataset: datasets.Dataset) -> tuple[int, int]:
    """The lowest and the highest internal id in `item_ids`; `(1, 1)` where there is none."""
    low, high = [], []
    for batch in dataset.select_columns(["item_ids"]).with_format("arrow").iter(batch_size=1 << 16):
        extremes = pc.min_max(pc.list_flatten(batch["item_ids"])).as_py()
        if extremes["min"] is not None:
            low.append(extremes["min"])
            high.append(extremes["max"])
    return min(low, default=1), max(high, default=1)


def _sorted_items(
    interactions: datasets.Dataset, vocabulary: ItemVocabulary
) -> tuple[pa.Table, np.ndarray, pa.Array, np.ndarray]:
    """The sorted log, each row's user index, the users, and each row's internal item id (`int32`)."""
    table, user, users = sort_log(log_table(interactions))
    return table, user, users, vocabulary.encode(table["item_id"]).astype(np.int32)


def _splits(users: pa.Array, user: np.ndarray, items: np.ndarray, ends: dict[str, np.ndarray]) -> datasets.DatasetDict:
    """Rows with the first `ends[split][u]` items of user `u`; no split may hold what a later one asks for."""
    order = ["train", "validation", "test"]
    for earlier, later in (order[:2], order[1:], order[::2]):
        # The last item of a row is its target, so a row with a target is longer than any row it must not be seen in.
        leaks = (ends[earlier] >= ends[later]) & (ends[earlier] >= 2) & (ends[later] >= 2)
        if leaks.any():
            raise DataError(f"{int(leaks.sum())} targets of {later} lie in {earlier}; this is a bug, please report it")
    row_ids = np.cumsum(np.maximum.reduce(list(ends.values())) >= 2) - 1
    return datasets.DatasetDict({name: _rows(users, row_ids, user, items, ends[name]) for name in order})


def _rows(
    users: pa.Array, row_ids: np.ndarray, user: np.ndarray, items: np.ndarray, ends: np.ndarray
) -> datasets.Dataset:
    """One row per user with the first `ends[u]` items of user `u`; below two items there is nothing to predict."""
    ends = np.where(ends >= 2, ends, 0)
    lengths = np.bincount(user, minlength=len(users))
    position = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = items[position < ends[user]]
    kept = np.flatnonzero(ends)
    offsets = np.zeros(len(kept) + 1, np.int64)
    np.cumsum(ends[kept], out=offsets[1:])
    # 32-bit offsets are what `datasets` stores; 2**31 interactions are out of its reach anyhow.
    item_ids = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
    columns = {
        "user_id": users.take(pa.array(kept)),
        "item_ids": item_ids,
        "length": pc.list_value_length(item_ids),
        "row_id": pa.array(row_ids[kept], pa.int64()),
    }
    return to_dataset(pa.table(columns))
