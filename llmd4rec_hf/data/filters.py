# SPDX-License-Identifier: Apache-2.0
"""What is left out of a log: low ratings, other times, repeats, overlong histories, and what is too rare to learn."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigurationError, DataError
from .arrow import is_string, sorted_codes, to_dataset
from .columns import moment
from .interactions import log_table, sort_log


logger = logging.getLogger(__name__)

DUPLICATES = ("keep", "exact", "first", "last")


def filter_interactions(
    interactions: datasets.Dataset,
    *,
    min_rating: float | None = None,
    start_time: float | str | None = None,
    end_time: float | str | None = None,
    duplicates: str = "keep",
    max_history: int | None = None,
    min_history: int = 0,
    k_user: int = 0,
    k_item: int = 0,
) -> datasets.Dataset:
    """
    Leaves out what is not to be learnt from. Nothing goes unless an option says so.

    The steps follow each other in the order of the arguments, so that the last promise holds in the result: every user
    has `min_history` to `max_history` interactions and every item `k_item` or more.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.
        min_rating (`float`, *optional*):
            Interactions rated lower go.
        start_time, end_time (`float` or `str`, *optional*):
            Interactions before the one and at or after the other go. Seconds since 1970, an ISO date, or whatever else
            a log's column of times may hold.
        duplicates (`str`, *optional*, defaults to `"keep"`):
            What becomes of a user's repeated interactions with one item: `"keep"` them all, for people do come back;
            `"exact"` drops those that also share the time; `"first"` and `"last"` keep that one alone.
        max_history (`int`, *optional*):
            Of a longer history the newest interactions stay.
        min_history (`int`, *optional*, defaults to 0):
            Fewest interactions of a user; the same as `k_user`, of which the larger one counts.
        k_user, k_item (`int`, *optional*, defaults to 0):
            See [`k_core`].

    Returns:
        `datasets.Dataset`: The columns as they were.

    Raises:
        `ConfigurationError`: An option is out of range.
        `DataError`: Nothing is left, or the log lacks the ratings or times that an option speaks of.
    """
    if duplicates not in DUPLICATES:
        raise ConfigurationError(f"duplicates={duplicates!r}; choose one of {', '.join(DUPLICATES)}")
    if max_history is not None and max_history < max(min_history, 1):
        raise ConfigurationError(f"max_history={max_history}; it must be 1 or more and not below min_history")
    table = sort_log(log_table(interactions))[0]  # "first" and "last" are those in time
    table = _only(table, _rated(table, min_rating), f"min_rating={min_rating}")
    table = _only(table, _in_window(table, start_time, end_time), "the time window")
    table = _only(table, _distinct(table, duplicates), f"duplicates={duplicates}")
    table = _only(table, _newest(table, max_history), f"max_history={max_history}")
    if max(min_history, k_user, k_item) > 1:
        return k_core(to_dataset(table), max(min_history, k_user), k_item)
    return to_dataset(table)


def k_core(interactions: datasets.Dataset, k_user: int = 5, k_item: int = 5) -> datasets.Dataset:
    """
    The largest part of the log in which every user has `k_user` and every item `k_item` interactions or more.

    Dropping an item can leave a user short and the other way round, so both are repeated until nothing changes.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.
        k_user (`int`, *optional*, defaults to 5):
            Fewest interactions of a user.
        k_item (`int`, *optional*, defaults to 5):
            Fewest interactions of an item.

    Raises:
        `DataError`: Nothing is left.
    """
    table = log_table(interactions)
    user, item = sorted_codes(table["user_id"])[0], sorted_codes(table["item_id"])[0]
    rows = np.arange(len(user), dtype=np.int32)  # `datasets` cannot hold more rows of lists anyhow
    users, items = np.bincount(user), np.bincount(item)
    while True:
        # A byte per user and item is looked up faster than a count, and only what goes is counted again.
        keep = (users >= k_user)[user] & (items >= k_item)[item]
        if keep.all():
            break
        users -= np.bincount(user[~keep], minlength=len(users))
        items -= np.bincount(item[~keep], minlength=len(items))
        rows, user, item = rows[keep], user[keep], item[keep]
        if len(rows) == 0:
            raise DataError(f"no interaction is left at k_user={k_user}, k_item={k_item}; choose smaller values")
    if len(rows) == table.num_rows:
        return to_dataset(table)
    logger.info("k-core (%d, %d) keeps %d of %d interactions", k_user, k_item, len(rows), table.num_rows)
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    return to_dataset(table.filter(pa.array(mask)))


def _only(table: pa.Table, keep: np.ndarray | None, reason: str) -> pa.Table:
    if keep is None or keep.all():
        return table
    if not keep.any():
        raise DataError(f"no interaction is left after {reason}; choose another value")
    logger.info("%s keeps %d of %d interactions", reason, keep.sum(), len(keep))
    return table.filter(pa.array(keep))


def _rated(table: pa.Table, least: float | None) -> np.ndarray | None:
    if least is None:
        return None
    if "rating" not in table.column_names:
        raise DataError("min_rating is set and the log has no ratings; name their column or leave min_rating out")
    try:
        ratings = table["rating"]
        if is_string(ratings.type):
            # In a text file, a rating that is not there.
            ratings = pc.if_else(pc.equal(pc.utf8_trim_whitespace(ratings), ""), None, ratings)
        ratings = ratings.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"min_rating is set and the ratings are no numbers ({error}); correct them") from error
    return np.asarray(pc.fill_null(pc.greater_equal(ratings, least), False))


def _in_window(table: pa.Table, start: Any, end: Any) -> np.ndarray | None:
    if start is None and end is None:
        return None
    if "position" in table.column_names:
        raise DataError("a time window is set and the log has positions, not times; leave the window out")
    time = table["timestamp"].to_numpy()
    keep = np.ones(len(time), bool)
    if start is not None:
        keep &= time >= moment(start, "start_time")
    if end is not None:
        keep &= time < moment(end, "end_time")
    return keep


def _distinct(table: pa.Table, policy: str) -> np.ndarray | None:
    if policy == "keep":
        return None
    user, item = sorted_codes(table["user_id"])[0], sorted_codes(table["item_id"])[0]
    pair = user.astype(np.int64) * (int(item.max()) + 1) + item
    if policy == "exact":
        return ~pd.DataFrame({"pair": pair, "time": table["timestamp"].to_numpy()}).duplicated().to_numpy()
    return ~pd.Series(pair).duplicated(keep=policy).to_numpy()


def _newest(table: pa.Table, most: int | None) -> np.ndarray | None:
    if most is None:
        return None
    user = sorted_codes(table["user_id"])[0]
    ends = np.cumsum(np.bincount(user))
    return ends[user] - np.arange(len(user)) <= most
