# SPDX-License-Identifier: Apache-2.0
"""Interaction logs: from any supported source to one plain form, and what can be counted in them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import DataError
from .arrow import sorted_codes, to_dataset, to_table
from .columns import clock_beside, day_and_clock, ids, may_be_order, ratings, resolve_columns, seconds, times
from .sources import open_source


logger = logging.getLogger(__name__)


def load_interactions(
    source: str | Path | pd.DataFrame | datasets.Dataset,
    *,
    format: str = "auto",
    columns: dict[str, str | int] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset:
    """
    Loads an interaction log.

    Rows come back sorted by user, then by time; rows of one user with equal times keep their order in the file.

    Args:
        source (`str`, `Path`, `pandas.DataFrame` or `datasets.Dataset`):
            A file in any of the formats of [`~llmd4rec_hf.data.formats`] (text may be gzipped), a folder that holds
            `interactions.*` or the files of such a format, a table, or, where no such path exists, the id of a
            dataset on the Hub, with a colon before the configuration if it has several.
        format (`str`, *optional*, defaults to `"auto"`):
            The name of the file's format; `"auto"` finds it by the content.
        columns (`dict[str, str or int]`, *optional*):
            Our column names mapped to those of the source, such as `{"user_id": "reviewerID"}`, or, for a text table
            whose first line names no columns, to their numbers from 0. Columns that are not named here are guessed
            from common names, and the guess is logged.
        revision (`str`, *optional*):
            The branch, tag or commit of a Hub dataset.
        token (`str` or `bool`, *optional*):
            The token for a private Hub dataset.

    Returns:
        `datasets.Dataset`: `user_id` and `item_id` (`int64` or `string`), `timestamp` (`int64`, or `float64` where
        fractions occur; in seconds where the source has a clock), `rating` where the source has one, and any further
        column named in `columns`. A log without timestamps is ordered by its `position` column or else by the file;
        `timestamp` then repeats that order, and a column `position` remains to say that there is no clock.

    Raises:
        `DataError`: The source is missing, empty, not understood, or holds missing ids or impossible times.
    """
    opened = open_source(source, "interactions", format=format, columns=columns, revision=revision, token=token)
    where, names, table = opened.where, opened.names, None
    if names is None:
        table = opened.read(None)
        names = table.column_names
    wanted = ("user_id", "item_id", "timestamp", "position", "rating")
    mapping = resolve_columns(names, columns, where, wanted, required=2, hints=opened.hints)
    day = mapping.get("timestamp", "")
    clock = None if "timestamp" in (columns or {}) else clock_beside(day, names)
    if table is None:
        table = opened.read(list(dict.fromkeys([*mapping.values(), *filter(None, [clock])])))
    if table.num_rows == 0:
        raise DataError(f"{where}: holds no interactions; check how it was written")
    if clock is not None:
        table = table.set_column(table.column_names.index(day), day, day_and_clock(table, day, clock, where))
    log = {name: ids(table[mapping[name]], f"{where}, column {mapping[name]!r}") for name in ("user_id", "item_id")}
    log.update(_order_columns(table, mapping, where, names))
    if "rating" in mapping:
        log["rating"] = ratings(table[mapping["rating"]])
    log.update({name: table[theirs] for name, theirs in mapping.items() if name not in {*log, "position"}})
    del table  # the columns that are not needed any more
    return to_dataset(sort_log(pa.table(log))[0])


def describe_interactions(interactions: datasets.Dataset) -> dict[str, Any]:
    """
    Counts the log.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.

    Returns:
        `dict`: `users`, `items`, `interactions`, `density`, `median_length`, `max_length`, `tie_share` (see
        [`tied_timestamp_share`]), `repeat_share` (interactions with an item the user has met before) and `hash`, a
        sha256 of the content that does not depend on the format or row order it was stored in.
    """
    table, user, users = sort_log(log_table(interactions))
    item, items = sorted_codes(table["item_id"])
    lengths = np.bincount(user)
    pairs = pd.unique(user.astype(np.int64) * len(items) + item)
    return {
        "users": len(users),
        "items": len(items),
        "interactions": len(user),
        "density": len(user) / (len(users) * len(items)),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "tie_share": _tie_share(user, table["timestamp"].to_numpy()),
        "repeat_share": 1 - len(pairs) / len(user),
        "hash": _content_hash(table, user, users, item, items),
    }


def tied_timestamp_share(interactions: datasets.Dataset) -> float:
    """The share of interactions whose user has another one at the same time, so that only the file orders them."""
    table, user, _ = sort_log(log_table(interactions))
    return _tie_share(user, table["timestamp"].to_numpy())


def sort_log(table: pa.Table) -> tuple[pa.Table, np.ndarray, pa.Array]:
    """
    Sorts a log by user id and time, stably.

    Returns:
        The sorted table, each row's user index (`int32`), and the users in order.
    """
    user, users = sorted_codes(table["user_id"])
    time = table["timestamp"].to_numpy()
    later = (user[1:] > user[:-1]) | ((user[1:] == user[:-1]) & (time[1:] >= time[:-1]))
    if later.all():
        return table, user, users
    del later
    order = _stable_order(user, time)
    return table.take(pa.array(order)), user[order], users


def _stable_order(user: np.ndarray, time: np.ndarray) -> np.ndarray:
    """The rows by user, then by time. One number for both keys sorts twice as fast as two keys."""
    if time.dtype.kind in "iu" and len(time):
        first, span = int(time.min()), int(time.max()) - int(time.min()) + 1
        if (int(user.max()) + 1) * span < 2**63:
            return np.argsort(user.astype(np.int64) * span + (time - first), kind="stable")
    return np.lexsort((time, user))


def _order_columns(
    table: pa.Table, names: dict[str, str], where: str, all_names: list[str]
) -> dict[str, pa.ChunkedArray]:
    if "timestamp" in names and not _repeats_position(table, names):
        name = f"{where}, column {names['timestamp']!r}"
        return {"timestamp": seconds(times(table[names["timestamp"]], name), name)}
    if "position" in names:
        logger.info("%s: no timestamps; ordered by column %r", where, names["position"])
        order = times(table[names["position"]], f"{where}, column {names['position']!r}")
    else:
        _say_unordered(where, [name for name in all_names if name not in names.values() and may_be_order(name)])
        order = pa.chunked_array([np.arange(table.num_rows)])
    return {"timestamp": order, "position": order}


def _say_unordered(where: str, perhaps: list[str]) -> None:
    """A log out of order teaches the wrong thing and looks like any other."""
    if not perhaps:
        logger.info("%s: no timestamps and no position; the order of the file is kept", where)
        return
    logger.warning(
        "%s: no timestamps and no position, so the order of the file is kept; if %s holds the times, say so: "
        "columns={'timestamp': %r} (--columns timestamp=%s), or position where it only counts",
        where,
        " or ".join(map(repr, perhaps)),
        perhaps[0],
        perhaps[0],
    )


def _repeats_position(table: pa.Table, names: dict[str, str]) -> bool:
    """Whether the times are those that [`load_interactions`] gives to a log without a clock."""
    return "position" in names and table[names["timestamp"]].equals(table[names["position"]])


def log_table(interactions: datasets.Dataset) -> pa.Table:
    table = to_table(interactions)
    missing = {"user_id", "item_id", "timestamp"} - set(table.column_names)
    if missing:
        raise DataError(f"the log has no column {sorted(missing)[0]!r}; load it with load_interactions()")
    if table.num_rows == 0:
        raise DataError("the log holds no interactions; check what was filtered away")
    return table


def _tie_share(user: np.ndarray, time: np.ndarray) -> float:
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    tied = np.zeros(len(user), bool)
    tied[1:] |= same
    tied[:-1] |= same
    return float(tied.mean())


def _content_hash(table: pa.Table, user: np.ndarray, users: pa.Array, item: np.ndarray, items: pa.Array) -> str:
    # Users and items go in the order of their text, so that ids kept as numbers or as text give the same hash.
    user, users = _text_order(user, users)
    item, items = _text_order(item, items)
    rows = np.argsort(user, kind="stable")
    digest = hashlib.sha256()
    digest.update(json.dumps([users.to_pylist(), items.to_pylist()]).encode())
    digest.update(user[rows].data)
    digest.update(item[rows].data)
    if "position" not in table.column_names:  # without a clock only the order counts, and the rows are in it
        digest.update(table["timestamp"].to_numpy()[rows].data)
    return digest.hexdigest()


def _text_order(codes: np.ndarray, ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    if pa.types.is_string(ids.type):
        return codes, ids
    names = ids.cast(pa.string())
    order = pc.sort_indices(names)
    rank = np.empty(len(names), np.int32)
    rank[order.to_numpy()] = np.arange(len(names), dtype=np.int32)
    return rank[codes], names.take(order)
