# SPDX-License-Identifier: Apache-2.0
"""Which column is which, and columns of times and numbers in whatever way they were written."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigurationError, DataError
from .arrow import as_ids, decoded, first_true, is_string


logger = logging.getLogger(__name__)

# What others call our columns, best guess first; compared without case and punctuation.
KNOWN_NAMES = {
    "user_id": [
        "user_id", "user", "uid", "reviewer_id", "customer_id", "visitor_id", "session_id", "member_id", "profile_id",
        "account_id", "client_id", "user_idx", "username", "user_name",
    ],
    "item_id": [
        "item_id", "item", "iid", "parent_asin", "asin", "movie_id", "product_id", "business_id", "artist_id",
        "track_id", "song_id", "book_id", "article_id", "news_id", "video_id", "recipe_id", "game_id", "app_id",
        "isbn", "sku", "stock_code", "item_idx",
    ],
    "timestamp": [
        "timestamp", "time", "ts", "unix_review_time", "unix_time", "unix_timestamp", "event_timestamp",
        "timestamp_ms", "time_ms", "datetime", "date", "event_time", "created_at", "sort_timestamp", "review_time",
        "event_date", "order_date", "invoice_date", "purchase_date", "transaction_date", "t_dat",
    ],
    "position": ["position", "pos"],
    "rating": ["rating", "stars", "overall", "score", "book_rating"],
    "title": [
        "title", "name", "item_name", "item_title", "product_title", "movie_title", "book_title", "product_name",
        "prod_name", "app_name", "track_name", "song_name", "artist_name", "headline", "text",
    ],
    "brand": ["brand", "store", "manufacturer", "publisher", "developer", "author", "artist"],
    "category": ["category", "categories", "genres", "genre", "main_category", "main_cat", "tags", "class"],
    "description": ["description", "overview", "about", "features", "feature"],
}  # fmt: skip

# Dates whose digits are one number: what the day is multiplied by, and the form as people spell it.
NUMBER_DATES = ((1, "YYYYMMDD"), (10**4, "YYYYMMDDhhmm"), (10**6, "YYYYMMDDhhmmss"))
# How programs write a value that is not there.
NO_VALUES = pa.array(["NULL", "null", "\\N", "NA", "N/A", "nan", "NaN", "None", "<NA>"])
# Ids that are ids and look like accidents, and what to do. They stay: somebody may be called so.
ODD_IDS = (
    (
        rf"^({'|'.join(map(re.escape, NO_VALUES.to_pylist()))})$",
        "which often stands for none; drop these rows if it does here",
    ),
    (
        r"""(?s)^(\s.*|.*\s|".*"|'.*')$""",
        "whose blanks or quotes are part of it; take them out if they are not meant",
    ),
    (
        r"^-?[0-9]([.,][0-9]+)?E\+[0-9]+$",
        "as spreadsheets round long numbers, and several may have become one; take the ids from where they came from",
    ),
    (r"^\[.*,.*\]$", "a list that counts as one; write a row for each of its ids"),
)


def resolve_columns(
    names: list[str],
    columns: dict[str, str | int] | None,
    where: str,
    wanted: Sequence[str],
    *,
    required: int,
    hints: dict[str, tuple[str, ...]] | None = None,
) -> dict[str, str]:
    """
    Our names mapped to those of a table.

    Args:
        names (`list[str]`):
            The table's columns.
        columns (`dict[str, str or int]`, *optional*):
            What the caller said; it wins.
        where (`str`):
            Names the table in messages.
        wanted (`Sequence[str]`):
            Our names; the first `required` of them must be found.
        required (`int`):
            See `wanted`.
        hints (`dict[str, tuple[str, ...]]`, *optional*):
            What the table's format calls them, before any common name.

    Raises:
        `DataError`: A column is named twice, is not there, or cannot be guessed; or `columns` has not our name for it.
    """
    columns = {ours: str(theirs) for ours, theirs in (columns or {}).items()}
    _check_given(columns, names, where, wanted)
    plain = {_plain(name): name for name in reversed(names) if name not in columns.values()}
    for ours in wanted:
        theirs = None if ours in columns else _guess(ours, plain, (hints or {}).get(ours, ()))
        if theirs is not None:
            columns[ours] = theirs
            if theirs != ours:
                logger.info("%s: taking column %r as %s", where, theirs, ours)
    missing = [name for name in wanted[:required] if name not in columns]
    if missing == ["user_id"] and any(is_known(name, "title") for name in names):
        raise DataError(f"{where}: has titles and no users, so it is a catalogue and no log; pass it as the items")
    if missing:
        found = ", ".join(map(repr, names[:12]))
        raise DataError(
            f"{where}: no column for {', '.join(missing)} among {found}; "
            "the first line must name the columns, or say which it is, by its number from 0 where it has no name: "
            f"columns={{{missing[0]!r}: ...}} (--columns {missing[0]}=...)"
        )
    return columns


def _check_given(columns: dict[str, str], names: list[str], where: str, wanted: Sequence[str]) -> None:
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise DataError(
            f"{where}: the column {doubled[0]!r} occurs more than once; rename one of them, or give numbers from 0 "
            "where the first line names no columns: columns={'user_id': 0, ...} (--columns user_id=0 ...)"
        )
    for ours, theirs in columns.items():
        meant = next((name for name in wanted if ours in KNOWN_NAMES[name][1:]), None)
        if meant is not None and meant not in columns:
            # It would become one more column, and a log that is in no order at all would be taken as it is.
            raise DataError(f"{where}: {ours!r} is none of our columns; did you mean {meant!r} for {theirs!r}?")
        if theirs not in names:
            raise DataError(f"{where}: no column {theirs!r} (for {ours!r}); it has {', '.join(names)}")


def _guess(ours: str, plain: dict[str, str], hints: Sequence[str]) -> str | None:
    """The column that our name may stand for, among the table's own by their plain names."""
    known = KNOWN_NAMES[ours]
    if ours == "timestamp" and {"date", "time"} <= plain.keys():
        # Neither is the moment while there is another column of times; `date` is completed by `day_and_clock`.
        known = [*(name for name in known if name not in ("date", "time")), "date"]
    return next((plain[_plain(name)] for name in (*hints, *known) if _plain(name) in plain), None)


def clock_beside(day: str, names: list[str]) -> str | None:
    """The column `time` beside a column `date`: together they may be the moment, and neither is alone."""
    plain = {_plain(name): name for name in names}
    return plain.get("time") if _plain(day) == "date" else None


def day_and_clock(table: pa.Table, day: str, clock: str, where: str) -> pa.ChunkedArray:
    """
    Days and the times of day beside them as moments, in text.

    Raises:
        `DataError`: The columns are something else, so that one alone may be the moment.
    """
    # As text: midnight goes from days that are kept as times; 20170714 and 9:30 get what ISO wants.
    days = _text(table[day], (r"[T ]00:00:00(\.0+)?$", ""), (r"^([0-9]{4})([0-9]{2})([0-9]{2})$", r"\1-\2-\3"))
    clocks = _text(table[clock], (r"^([0-9]):", r"0\1:"))
    for texts, form in ((days, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"), (clocks, r"^[0-9]{2}:[0-9]{2}(:[0-9.]+)?$")):
        if not pc.all(pc.match_substring_regex(texts, form)).as_py():
            raise DataError(
                f"{where}: which of {day!r} and {clock!r} is the moment? Join them into one column, or say which it "
                f"is: columns={{'timestamp': {day!r}}} (--columns timestamp={day})"
            )
    logger.info("%s: taking columns %r and %r together as timestamp", where, day, clock)
    return pc.binary_join_element_wise(days, clocks, " ")


def _text(column: pa.ChunkedArray, *replaced: tuple[str, str]) -> pa.ChunkedArray:
    texts = decoded(column).cast(pa.string())
    for pattern, replacement in replaced:
        texts = pc.replace_substring_regex(texts, pattern, replacement)
    return texts


def is_known(name: str, ours: str) -> bool:
    """Whether `name` is one of the common names of our column `ours`."""
    return _plain(name) in map(_plain, KNOWN_NAMES[ours])


def may_be_order(name: str) -> bool:
    """Whether a column that is none of those we know may hold times or an order, by the words in its name."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    orders = {"at", "dat", "day", "dt", "ts", "seq", "sequence", "step"}
    return _plain(name) == "ordernumber" or any(
        word in orders or word.endswith(("date", "time", "stamp")) for word in words
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def ids(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """What [`as_ids`] makes of a column that was read: ids that look like accidents are refused or warned of."""
    column = as_ids(column, where)
    if not is_string(column.type):
        return column
    row = first_true(pc.match_substring(column, "\n"))
    if row is not None:
        raise DataError(
            f"{where}: row {row + 1} holds {column[row].as_py()[:40]!r}, an id with a line break, as a stray quote "
            "makes it of several rows; double the quotes in texts or take them out"
        )
    # Regular expressions are slow: only those that may match are given to them.
    trimmed = pc.ascii_trim(column, " \t\"'")
    odd = pc.less(pc.binary_length(trimmed), pc.binary_length(column))
    for others in (
        pc.is_in(column, value_set=NO_VALUES),
        pc.match_substring(column, "E+"),
        pc.starts_with(column, "["),
    ):
        odd = pc.or_(odd, others)
    odd = column.filter(odd)
    for pattern, advice in ODD_IDS:
        found = odd.filter(pc.match_substring_regex(odd, pattern))
        if len(found):
            names = " or ".join(map(repr, pc.unique(found).to_pylist()[:3]))
            logger.warning("%s: %d rows have the id %s, %s", where, len(found), names, advice)
    return column


def times(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Times as `int64` where they are whole, else `float64`; dates become seconds since 1970."""
    row = first_true(pc.is_null(column, nan_is_null=True))
    if row is not None:
        raise DataError(f"{where}: row {row + 1} has no time; fill it in or drop the row")
    values = _numbers(column, where)
    _refuse_impossible(values, column, where)
    return whole(values)


def seconds(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """
    Times in seconds. Finer units are known by their size: as seconds they would lie after the year 5000. Dates written
    as numbers (20170714, 201707142359 or 20170714235959) are known by being dates, most of them: as seconds or
    milliseconds they would lie in the seventies or after 2500.
    """
    lowest, highest = pc.min_max(values).as_py().values()
    dates = _written_as_numbers(values, where) if pa.types.is_integer(values.type) else None
    if dates is not None:
        return dates
    unit, parts = _unit(lowest)
    if _unit(highest) != (unit, parts):
        low, high = (first_true(pc.equal(values, value)) + 1 for value in (lowest, highest))
        raise DataError(
            f"{where}: row {low} holds {lowest} and row {high} {highest}, which are times of different units, or one "
            "of them is no time; correct or drop it"
        )
    if parts == 1:
        return values
    logger.info("%s: times in %sseconds are turned to seconds", where, unit)
    return whole(pc.divide(values.cast(pa.float64(), safe=False), parts))


def _written_as_numbers(values: pa.ChunkedArray, where: str) -> pa.ChunkedArray | None:
    """The seconds of dates whose digits were written as one number; `None` where most values are no such dates."""
    lowest, highest = pc.min_max(values).as_py().values()
    for finer, spelling in NUMBER_DATES:
        if not (19000101 * finer <= lowest and highest < 21010101 * finer):
            continue
        moments, real = written_moments(values.to_numpy(), finer)
        if real.mean() <= 0.5:
            continue
        row = first_true(~real)
        if row is not None:
            raise DataError(f"{where}: row {row + 1} holds {values[row]}, which is no date; correct or drop it")
        logger.info("%s: numbers that are dates (%s) are turned to seconds", where, spelling)
        found = pa.chunked_array([pa.array(moments)])
        _refuse_impossible(found, values, where)
        return found
    return None


def written_moments(numbers: np.ndarray, finer: int) -> tuple[np.ndarray, np.ndarray]:
    """The seconds of dates written as numbers, and which of them are real: to Arrow, 31 June is 1 July."""
    days, clock = np.divmod(numbers, finer)
    clock *= 10**6 // finer
    year, month, day = days // 10000, days // 100 % 100, days % 100
    hour, minute, second = clock // 10000, clock // 100 % 100, clock % 100
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    dates = months.astype("datetime64[D]") + (day - 1)
    real = (1 <= month) & (month <= 12) & (dates.astype("datetime64[M]") == months)
    real &= (hour < 24) & (minute < 60) & (second < 62)  # two leap seconds, as in C
    return dates.astype("int64") * 86400 + hour * 3600 + minute * 60 + second, real


def moment(value: Any, name: str) -> float:
    """One time, given as the option `name`, in seconds; it means what it would in a log's column of times."""
    try:
        return seconds(times(pa.chunked_array([[value]]), name), name)[0].as_py()
    except (DataError, TypeError, pa.ArrowException) as error:
        raise ConfigurationError(f"{name}={value!r} is no time; give seconds since 1970 or an ISO date") from error


def _unit(time: float) -> tuple[str, float]:
    """The prefix of the seconds that a time is in, and how many of them make a second."""
    finer = (("nano", 1e17, 1e9), ("micro", 1e14, 1e6), ("milli", 1e11, 1e3))
    return next(((unit, parts) for unit, least, parts in finer if time >= least), ("", 1))


def _refuse_impossible(values: pa.ChunkedArray, column: pa.ChunkedArray, where: str) -> None:
    row = first_true(pc.or_(pc.less(values, 0), pc.invert(pc.is_finite(values))))
    if row is not None:
        raise DataError(f"{where}: row {row + 1} holds {column[row].as_py()}, which is no time; correct or drop it")


def whole(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Floats as `int64` if none has a fraction."""
    if not pa.types.is_floating(values.type):
        return values
    integral = pc.all(pc.and_(pc.equal(pc.floor(values), values), pc.less(values, 2**53))).as_py()
    return values.cast(pa.int64() if integral else pa.float64())


def ratings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Numbers where the text holds numbers ("4" and "4.5", or "4,5", in one column); anything else as it is."""
    if not is_string(column.type):
        return column
    # Three digits after a comma may be those of thousands.
    for texts in (column, pc.replace_substring_regex(column, r"^(-?[0-9]+),([0-9]{1,2})$", r"\1.\2")):
        try:
            return texts.cast(pa.float64())
        except pa.ArrowInvalid:
            continue
    return column


def _numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    column = decoded(column)
    kind = column.type
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        microseconds = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pc.divide(microseconds.cast(pa.float64()), 1e6)
    if not is_string(kind):
        raise DataError(f"{where}: type {kind} is no moment; give seconds or dates")
    texts = pc.utf8_trim_whitespace(column)
    parsed = _parsed(texts)
    if parsed is None:
        # BigQuery and Snowflake write their zones so. Only now, since most logs need none of it and it takes longest.
        texts = pc.replace_substring_regex(texts, " UTC$", "Z")
        texts = pc.replace_substring_regex(texts, "(:[0-9.]+) ([+-][0-9:]+)$", r"\1\2")
        parsed = _parsed(texts)
    if parsed is None:
        raise DataError(f"{where}: {_why_unparsed(texts)}")
    return _numbers(parsed, where)


def _parsed(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Texts as numbers or as moments; `None` where some are neither."""
    for target in (pa.float64(), *(pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC"))):
        try:
            return texts.cast(target)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return None


def _why_unparsed(texts: pa.ChunkedArray) -> str:
    values = pd.Series(texts.to_pandas())
    bad = pd.to_numeric(values, errors="coerce").isna()
    if bad.all():  # dates, then
        bad = pd.to_datetime(values, errors="coerce", format="ISO8601", utc=True).isna()
        bad |= ~values.str.match(r"\d{4}-\d\d-\d\d([ T]|$)")  # pandas takes more for ISO 8601 than Arrow does
        zoned = values.str.contains(r"[ T]\d.*(?:Z|[+-]\d\d(?::?\d\d)?)$")
        if not bad.any() and zoned.any() and not zoned.all():
            return "some dates name a time zone and others do not; write them all in one way"
    row = first_true(bad.to_numpy()) or 0
    remedy = "write all so (pandas.to_datetime reads other forms)" if bad.all() else "correct it or drop the row"
    return (
        f"row {row + 1} holds {values[row]!r}, which is neither a number nor an ISO date (2019-10-01 or "
        f"2019-10-01 12:30:00); {remedy}"
    )
