# SPDX-License-Identifier: Apache-2.0
"""Interaction logs and catalogues: from any supported source to one plain form."""

from __future__ import annotations

import hashlib
import html
import json
import logging
import re
import string
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetNotFoundError

from ..errors import ConfigurationError, DataError
from .arrow import as_ids, as_texts, first_true, is_string, sorted_codes, to_dataset, to_table
from .formats import detect_format, first_line


logger = logging.getLogger(__name__)

# What others call our columns, best guess first; compared without case and punctuation.
KNOWN_NAMES = {
    "user_id": ["user_id", "user", "uid", "reviewer_id", "customer_id", "visitor_id", "session_id", "user_idx"],
    "item_id": [
        "item_id", "item", "iid", "parent_asin", "asin", "movie_id", "product_id", "business_id", "artist_id",
        "track_id", "song_id", "book_id", "article_id", "game_id", "app_id", "isbn", "sku", "item_idx",
    ],
    "timestamp": [
        "timestamp", "time", "ts", "unix_review_time", "unix_time", "datetime", "date", "event_time", "created_at",
        "review_time",
    ],
    "position": ["position", "pos"],
    "rating": ["rating", "stars", "overall", "score"],
    "title": ["title", "name", "item_name", "item_title", "product_title", "movie_title", "product_name", "text"],
}  # fmt: skip
DATA_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".txt", ".gz", ".inter", ".item", ".dat", ".data")


def load_interactions(
    source: str | Path | pd.DataFrame | datasets.Dataset,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset:
    """
    Loads an interaction log.

    Rows come back sorted by user, then by time; rows of one user with equal times keep their order in the file.

    Args:
        source (`str`, `Path`, `pandas.DataFrame` or `datasets.Dataset`):
            A CSV, TSV, JSON-lines (each optionally gzipped), parquet or S3-Rec text file, a folder that holds
            `interactions.*`, a table, or, where no such path exists, the id of a dataset on the Hub.
        format (`str`, *optional*, defaults to `"auto"`):
            The name of the file's format; `"auto"` finds it by the content.
        columns (`dict[str, str]`, *optional*):
            Our column names mapped to those of the source, such as `{"user_id": "reviewerID"}`. Columns that are not
            named here are guessed from common names, and the guess is logged.
        revision (`str`, *optional*):
            The branch, tag or commit of a Hub dataset.
        token (`str` or `bool`, *optional*):
            The token for a private Hub dataset.

    Returns:
        `datasets.Dataset`: `user_id` and `item_id` (`int64` or `string`), `timestamp` (`int64`, or `float64` where
        fractions occur), `rating` where the source has one, and any further column named in `columns`. A log without
        timestamps is ordered by its `position` column or else by the file; `timestamp` then repeats that order, and a
        column `position` remains to say that there is no clock.

    Raises:
        `DataError`: The source is missing, empty, not understood, or holds missing ids or impossible times.
    """
    table, where = _read(source, "interactions", format=format, revision=revision, token=token)
    wanted = ("user_id", "item_id", "timestamp", "position", "rating")
    names = _resolve_columns(table, columns, where, wanted, required=2)
    if table.num_rows == 0:
        raise DataError(f"{where}: holds no interactions; check how it was written")
    log = {name: as_ids(table[names[name]], f"{where}, column {names[name]!r}") for name in ("user_id", "item_id")}
    log.update(_order_columns(table, names, where))
    log.update({name: table[theirs] for name, theirs in names.items() if name not in {*log, "position"}})
    return to_dataset(sort_log(pa.table(log))[0])


def load_items(
    source: str | Path | pd.DataFrame | datasets.Dataset,
    *,
    format: str = "auto",
    columns: dict[str, str] | None = None,
    text_template: str | None = None,
    max_text_length: int = 512,
    revision: str | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset | None:
    """
    Loads the catalogue.

    Args:
        source (`str`, `Path`, `pandas.DataFrame` or `datasets.Dataset`):
            A file with one item per row, a folder that holds `items.*`, a table, or the id of a dataset on the Hub.
        format (`str`, *optional*, defaults to `"auto"`):
            The name of the file's format; `"auto"` finds it by the content.
        columns (`dict[str, str]`, *optional*):
            Our names `item_id` and `title` mapped to those of the source; common names are guessed.
        text_template (`str`, *optional*):
            How an item is put into words, such as `"{title} ({category})"`; the title alone by default.
        max_text_length (`int`, *optional*, defaults to 512):
            Longer texts are cut to this many characters.
        revision (`str`, *optional*):
            The branch, tag or commit of a Hub dataset.
        token (`str` or `bool`, *optional*):
            The token for a private Hub dataset.

    Returns:
        `datasets.Dataset` or `None`: `item_id`, `title`, `text` and the source's other columns. `text` is free of HTML
        entities and runs of whitespace and never empty: an item without a title is described by its other text
        columns, or else by its id. `None` for a folder without `items.*`.

    Raises:
        `DataError`: The source is missing or not understood, an item occurs twice, or the template names no column.
    """
    table, where = _read(source, "items", format=format, revision=revision, token=token)
    if table is None:
        return None
    names = _resolve_columns(table, columns, where, ("item_id", "title"), required=1)
    ids = as_ids(table[names["item_id"]], f"{where}, column {names['item_id']!r}")
    _refuse_duplicates(ids, where)
    taken = {"item_id", "title", names["item_id"], names.get("title")}
    others = [name for name in table.column_names if name not in taken]
    title = table[names["title"]] if "title" in names else pa.chunked_array([pa.nulls(len(ids), pa.string())])
    catalogue = pa.table({"item_id": ids, "title": clean_text(title)} | {name: table[name] for name in others})
    text = _item_text(catalogue, text_template or "{title}", max_text_length, where)
    kept = catalogue.select([name for name in catalogue.column_names if name != "text"])
    return to_dataset(kept.append_column("text", text))


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
    rows = np.arange(len(user))
    while True:
        keep = (np.bincount(user)[user] >= k_user) & (np.bincount(item)[item] >= k_item)
        if keep.all():
            break
        rows, user, item = rows[keep], user[keep], item[keep]
        if len(rows) == 0:
            raise DataError(f"no interaction is left at k_user={k_user}, k_item={k_item}; choose smaller values")
    if len(rows) == table.num_rows:
        return to_dataset(table)
    logger.info("k-core (%d, %d) keeps %d of %d interactions", k_user, k_item, len(rows), table.num_rows)
    mask = np.zeros(table.num_rows, bool)
    mask[rows] = True
    return to_dataset(table.filter(pa.array(mask)))


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
    order = np.lexsort((time, user))
    return table.take(pa.array(order)), user[order], users


def clean_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without HTML entities, line breaks and runs of whitespace; empty where there is none."""
    column = pc.fill_null(column.cast(pa.string()), "")
    escaped = pc.match_substring(column, "&")
    if pc.any(escaped).as_py():
        # Arrow has no kernel for HTML entities: only the few texts that hold one take this detour.
        plain = [html.unescape(text) for text in column.filter(escaped).to_pylist()]
        column = pc.replace_with_mask(column.combine_chunks(), escaped.combine_chunks(), pa.array(plain, pa.string()))
    column = pc.utf8_trim_whitespace(pc.replace_substring_regex(column, r"[\s\p{Z}]+", " "))
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _read(source: Any, part: str, *, format: str, revision: str | None, token: Any) -> tuple[pa.Table | None, str]:
    """The table behind `source` and a name for it in messages."""
    if isinstance(source, pd.DataFrame):
        return _from_pandas(source), "DataFrame"
    if isinstance(source, datasets.Dataset):
        return to_table(source), "Dataset"
    if not isinstance(source, (str, Path)):
        raise DataError(f"cannot load {part} from {type(source).__name__}; pass a path, a DataFrame or a Dataset")
    path = Path(source).expanduser()
    if not path.exists() and _looks_like_hub_id(str(source)):
        return _from_hub(str(source), part, revision, token), str(source)
    found = detect_format(path, format)
    return (found.read(path) if part == "interactions" else found.read_items(path)), str(path)


def _from_pandas(frame: pd.DataFrame) -> pa.Table:
    columns = []
    for name, values in frame.items():
        try:
            columns.append(pa.chunked_array([pa.array(values, from_pandas=True)]))
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            logger.warning("DataFrame column %r mixes types: its values are turned to strings", name)
            columns.append(pa.chunked_array([pa.array(as_texts(values), pa.string())]))
    return pa.table(columns, names=[str(name) for name in frame.columns])


def _looks_like_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source)) and not source.lower().endswith(DATA_SUFFIXES)


def _from_hub(name: str, part: str, revision: str | None, token: Any) -> pa.Table | None:
    """A Hub dataset laid out like our folders (`interactions.*`, `items.*`), or else its only table as the log."""
    options = {"revision": revision, "token": token}
    try:
        return to_table(datasets.load_dataset(name, data_files=f"{part}.*", split="train", **options))
    except DatasetNotFoundError as error:
        raise _hub_error(name, error) from error
    except FileNotFoundError:  # the dataset is there and holds no file of that name
        if part == "items":
            return None
    except Exception as error:
        raise _hub_error(name, error) from error
    try:
        splits = datasets.load_dataset(name, **options)
    except Exception as error:
        raise _hub_error(name, error) from error
    if len(splits) > 1:
        logger.warning("%s: its splits %s are joined in this order", name, ", ".join(splits))
    return to_table(datasets.concatenate_datasets(list(splits.values())))


def _hub_error(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: no such file or folder, nor a Hub dataset ({first_line(error)}); check the name")


def _resolve_columns(
    table: pa.Table, columns: dict[str, str] | None, where: str, wanted: tuple[str, ...], required: int
) -> dict[str, str]:
    """Our names mapped to the names in `table`; the first `required` of `wanted` must be there."""
    columns = dict(columns or {})
    doubled = [name for name in table.column_names if table.column_names.count(name) > 1]
    if doubled:
        raise DataError(f"{where}: the column {doubled[0]!r} occurs more than once; rename one of them")
    for ours, theirs in columns.items():
        if theirs not in table.column_names:
            raise DataError(f"{where}: no column {theirs!r} (for {ours!r}); it has {', '.join(table.column_names)}")
    plain = {_plain(name): name for name in reversed(table.column_names) if name not in columns.values()}
    for ours in wanted:
        theirs = next((plain[_plain(name)] for name in KNOWN_NAMES[ours] if _plain(name) in plain), None)
        if ours not in columns and theirs is not None:
            columns[ours] = theirs
            if theirs != ours:
                logger.info("%s: taking column %r as %s", where, theirs, ours)
    missing = [name for name in wanted[:required] if name not in columns]
    if missing:
        found = ", ".join(map(repr, table.column_names[:12]))
        raise DataError(
            f"{where}: no column for {', '.join(missing)} among {found}; "
            f"the first line must name the columns, or pass columns={{{missing[0]!r}: ...}}"
        )
    return columns


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _order_columns(table: pa.Table, names: dict[str, str], where: str) -> dict[str, pa.ChunkedArray]:
    if "timestamp" in names:
        return {"timestamp": _times(table[names["timestamp"]], f"{where}, column {names['timestamp']!r}")}
    if "position" in names:
        logger.info("%s: no timestamps; ordered by column %r", where, names["position"])
        order = _times(table[names["position"]], f"{where}, column {names['position']!r}")
    else:
        logger.info("%s: no timestamps and no position; the order of the file is kept", where)
        order = pa.chunked_array([np.arange(table.num_rows)])
    return {"timestamp": order, "position": order}


def _times(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Times as `int64` where they are whole, else `float64`; dates become seconds since 1970."""
    row = first_true(pc.is_null(column, nan_is_null=True))
    if row is not None:
        raise DataError(f"{where}: row {row + 1} has no time; fill it in or drop the row")
    times = _numbers(column, where)
    row = first_true(pc.or_(pc.less(times, 0), pc.invert(pc.is_finite(times))))
    if row is not None:
        raise DataError(f"{where}: row {row + 1} holds {column[row].as_py()}, which is no time; correct or drop it")
    if pa.types.is_floating(times.type):
        whole = pc.all(pc.and_(pc.equal(pc.floor(times), times), pc.less(times, 2**53))).as_py()
        times = times.cast(pa.int64() if whole else pa.float64())
    return times


def _numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind):
        return column.cast(pa.float64())
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        microseconds = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64()), 1e6)
    for target in (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            parsed = column.cast(target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
        return parsed if target == pa.float64() else _numbers(parsed, where)
    example = _first_unparsed(column)
    raise DataError(f"{where}: {example}, which is neither a number nor an ISO date; correct it or drop the row")


def _first_unparsed(column: pa.ChunkedArray) -> str:
    values = pd.Series(column.to_pandas())
    bad = pd.to_numeric(values, errors="coerce").isna()
    if bad.all():  # dates, then
        bad = pd.to_datetime(values, errors="coerce", format="ISO8601", utc=True).isna()
    row = first_true(bad.to_numpy()) or 0
    return f"row {row + 1} holds {values[row]!r}"


def _refuse_duplicates(ids: pa.ChunkedArray, where: str) -> None:
    counts = pc.value_counts(ids)
    row = first_true(pc.greater(counts.field("counts"), 1))
    if row is not None:
        item = counts.field("values")[row].as_py()
        raise DataError(f"{where}: item {item!r} occurs more than once; keep one row of it")


def _item_text(catalogue: pa.Table, template: str, max_length: int, where: str) -> pa.ChunkedArray:
    text = _fill_template(catalogue, template, where)
    others = [f.name for f in catalogue.schema if is_string(f.type) and f.name not in ("item_id", "title", "text")]
    fallbacks = (_join([catalogue[name] for name in others]), catalogue["item_id"].cast(pa.string()))
    for fallback, source in zip(fallbacks, ("their other columns", "their id"), strict=True):
        empty = pc.equal(text, "")
        filled = pc.sum(pc.and_(empty, pc.not_equal(fallback, ""))).as_py()
        if filled:
            logger.warning("%s: %d items without a title are described by %s", where, filled, source)
        text = pc.if_else(empty, fallback, text)
    return pc.utf8_slice_codeunits(text, 0, max_length)


def _fill_template(catalogue: pa.Table, template: str, where: str) -> pa.ChunkedArray:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"text_template {template!r}: {error}") from error
    parts: list[Any] = []
    for literal, field, _, _ in pieces:
        if field is not None and field not in catalogue.column_names:
            found = ", ".join(catalogue.column_names)
            raise DataError(f"{where}: text_template names {field!r}; the columns are {found}")
        parts += [literal] if field is None else [literal, clean_text(catalogue[field])]
    return clean_text(pa.chunked_array([pc.binary_join_element_wise(*parts, "").combine_chunks()]))


def _join(columns: list[pa.ChunkedArray]) -> Any:
    if not columns:
        return pa.scalar("")
    joined = pc.binary_join_element_wise(*(clean_text(column) for column in columns), ", ")
    return pc.utf8_trim(pc.replace_substring_regex(joined, "(, )+", ", "), " ,")  # empty columns leave bare commas


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
