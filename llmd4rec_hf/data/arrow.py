# SPDX-License-Identifier: Apache-2.0
"""Arrow helpers shared by this folder: id columns, dense codes, and the way in and out of `datasets.Dataset`."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from ..errors import DataError


logger = logging.getLogger(__name__)


def to_table(dataset: datasets.Dataset) -> pa.Table:
    """The rows of `dataset` as one Arrow table (selections and shuffles applied)."""
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"expected a datasets.Dataset, got {type(dataset).__name__}; load it with load_interactions()")
    return dataset.with_format("arrow")[:]


def column_array(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """One column of numbers as an array. Taken through Python, as `dataset[name]` is, a million rows take minutes."""
    return to_table(dataset.select_columns(name))[name].to_numpy()


def to_dataset(table: pa.Table) -> datasets.Dataset:
    """A `datasets.Dataset` over `table`, without copying it. UUIDs, which it has no type for, become text."""
    for place, column in enumerate(table.columns):
        if _are_uuids(column.type):
            table = table.set_column(place, table.column_names[place], _plain(column))
    # A fingerprint of the content would serialise the whole table first; data kept in memory has no use for it.
    return datasets.Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def first_true(mask: pa.ChunkedArray | pa.Array | np.ndarray) -> int | None:
    """Position of the first true value, or `None`."""
    mask = np.asarray(mask)
    return int(mask.argmax()) if mask.any() else None


def as_ids(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """
    Brings an id column to `int64` or `string`, the two types an external id may have.

    Args:
        column (`pyarrow.ChunkedArray`):
            Integers of any width, whole-number floats (what pandas makes of integers with gaps) below 2**53 (of 32
            bits: 2**24), from where on they are not exact, whole decimals (what databases make of integers), strings,
            UTF-8 without a type, UUIDs, or a dictionary of those.
        where (`str`):
            Names the column in error messages.

    Raises:
        `DataError`: An id is missing or empty, or the type cannot be an id.
    """
    column = _plain(column)
    kind = column.type
    if pa.types.is_floating(kind):  # Arrow does not reckon in 16 bits
        column = column.cast(pa.float64())
    missing = pc.is_null(column, nan_is_null=True)
    if is_string(kind):
        column = column.cast(pa.string())
        missing = pc.or_(missing, pc.fill_null(pc.equal(column, ""), True))
    row = first_true(missing)
    if row is not None:
        raise DataError(f"{where}: row {row + 1} has no id; fill it in or drop the row")
    if pa.types.is_integer(kind) or pa.types.is_decimal256(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:  # unsigned hashes above 2**63
            return column.cast(pa.string())
    if pa.types.is_floating(kind):
        exact = 2.0 ** {16: 11, 32: 24, 64: 53}[kind.bit_width]
        row = first_true(pc.or_(pc.not_equal(pc.floor(column), column), pc.greater_equal(pc.abs(column), exact)))
        if row is None:
            return column.cast(pa.int64())
        raise DataError(f"{where}: row {row + 1} holds {column[row].as_py()}; ids must be integers or strings")
    if is_string(kind):
        return column
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    remedy = "write a row for each (pandas: explode)" if listed else "ids must be integers or strings"
    raise DataError(f"{where}: type {kind} cannot be an id; {remedy}")


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """What columns of dictionaries, UUIDs, bytes and decimals stand for; what is no id stays as it is."""
    column = decoded(column)
    kind = column.type
    if _are_uuids(kind):
        return pa.chunked_array([pa.array(as_texts(column.to_pylist()), pa.string())])
    try:
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return column.cast(pa.string())
        return column.cast(pa.decimal256(76, 0)) if pa.types.is_decimal(kind) else column
    except pa.ArrowInvalid:  # no UTF-8, or a fraction
        return column


def _are_uuids(kind: pa.DataType) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.uuid"


def id_array(values: Any, where: str) -> tuple[pa.ChunkedArray, bool]:
    """`values` (list, array, series or Arrow) as an id column, and whether mixed types had to become strings."""
    if isinstance(values, pa.ChunkedArray):
        return as_ids(values, where), False
    if isinstance(values, pa.Array):
        return as_ids(pa.chunked_array([values]), where), False
    if isinstance(values, str):
        raise DataError(f"{where}: expected several ids, got the string {values!r}; put it into a list")
    if hasattr(values, "__array__"):  # tensors, which Arrow would take apart element by element
        values = np.asarray(values)
    try:
        return as_ids(pa.chunked_array([pa.array(values, from_pandas=True)]), where), False
    except (pa.ArrowInvalid, pa.ArrowTypeError):  # integers and strings in one column
        return as_ids(pa.chunked_array([pa.array(as_texts(values), pa.string())]), where), True


def as_texts(values: Any) -> list[str | None]:
    """Each value as text, lists joined by commas; `None`, NaN and `pandas.NA` stay missing."""
    return [_as_text(value) for value in values]


def _as_text(value: Any) -> str | None:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if value is None or value is pd.NA or value != value:
        return None
    # What pandas makes of integers with gaps, beside the texts of a later part of the same file.
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def index_as_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with the levels of its index that have a name, which `set_index` gives, as columns again."""
    levels = [name for name in frame.index.names if name is not None and name not in frame.columns]
    return frame.reset_index(levels) if levels else frame


def from_pandas(frame: pd.DataFrame) -> pa.Table:
    """The columns of `frame`; one that mixes types becomes text."""
    columns = []
    for name, values in frame.items():
        try:
            columns.append(pa.chunked_array([pa.array(values, from_pandas=True)]))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            logger.warning("column %r mixes types: its values are turned to strings", name)
            columns.append(pa.chunked_array([pa.array(as_texts(values), pa.string())]))
        except UnicodeEncodeError:  # half of a pair of surrogates, as programs leave it that cut texts amid an emoji
            texts = [text and text.encode(errors="replace").decode() for text in as_texts(values)]
            columns.append(pa.chunked_array([pa.array(texts, pa.string())]))
    return pa.table(columns, names=[str(name) for name in frame.columns])


def same_type(first: pa.ChunkedArray, second: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Both id columns as they are, or both as strings where their types differ: `12` and `"12"` are one id."""
    if first.type == second.type:
        return first, second
    return first.cast(pa.string()), second.cast(pa.string())


def sorted_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Codes (`int32`, one per row) into the sorted distinct values, and those values."""
    if len(column) > 1:
        # Users come sorted from load_interactions(): then the runs are the answer, without a table of hashes.
        changes = pc.not_equal(column[1:], column[:-1])
        starts = np.concatenate([[0], np.flatnonzero(np.asarray(changes)) + 1])
        values = column.take(pa.array(starts)).combine_chunks()
        if len(values) < 2 or pc.all(pc.greater(values[1:], values[:-1])).as_py():
            lengths = np.diff(starts, append=len(column))
            return np.repeat(np.arange(len(values), dtype=np.int32), lengths), values
        del changes, starts
    if pa.types.is_integer(column.type):
        return _integer_codes(column.to_numpy())
    values = pc.unique(column)
    values = values.take(pc.sort_indices(values))
    return pc.index_in(column, value_set=values).to_numpy(), values


def _integer_codes(numbers: np.ndarray) -> tuple[np.ndarray, pa.Array]:
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    if high - low <= 4 * len(numbers) + 1000:  # a table with a place for every number is faster than hashing
        present = np.zeros(high - low + 1, bool)
        present[numbers - low] = True
        place = np.cumsum(present, dtype=np.int32) - 1
        return place[numbers - low], pa.array(np.flatnonzero(present) + low)
    codes, values = pd.factorize(numbers)
    order = np.argsort(values)
    place = np.empty(len(values), np.int32)
    place[order] = np.arange(len(values), dtype=np.int32)
    return place[codes], pa.array(values[order])


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values that a column of dictionaries stands for; another as it is."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_string(kind: pa.DataType) -> bool:
    """Whether a type is one of Arrow's string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
