# SPDX-License-Identifier: Apache-2.0
"""Where a table may come from: memory, a file or folder in any known format, or the Hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError

from ..errors import ConfigurationError, DataError, first_line
from .arrow import from_pandas, index_as_columns, to_table
from .formats import DelimitedFormat, detect_format


logger = logging.getLogger(__name__)

DATA_SUFFIXES = (".csv", ".tsv", ".parquet", ".jsonl", ".json", ".txt", ".gz", ".inter", ".item", ".dat", ".data")


@dataclass
class Source:
    """
    A table that has not been read yet.

    Attributes:
        where (`str`):
            Names it in messages.
        names (`list[str]` or `None`):
            Its columns, as far as they can be known without reading it.
        read (`Callable`):
            Given the needed columns (or `None` for all), returns the table.
        hints (`dict[str, tuple[str, ...]]`):
            What its format calls our columns.
    """

    where: str
    names: list[str] | None
    read: Callable[[list[str] | None], pa.Table]
    hints: dict[str, tuple[str, ...]] = field(default_factory=dict)


def open_source(
    source: Any,
    part: str,
    *,
    format: str = "auto",
    columns: dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Source | None:
    """`part` ("interactions" or "items") of `source`; `None` for a folder or Hub dataset that holds no items."""
    if columns is not None and not isinstance(columns, Mapping):
        raise ConfigurationError(
            f"columns={columns!r}: expected our names with those of the source, as in {{'item_id': 'sku'}}"
        )
    if isinstance(source, pd.DataFrame):
        source = index_as_columns(source)
        names = [str(name) for name in source.columns]
        frame = source.set_axis(names, axis=1)
        return Source("DataFrame", names, lambda chosen: from_pandas(frame if chosen is None else frame[chosen]))
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, "Dataset")
    if not isinstance(source, (str, Path)):
        ours = " (what its to_pandas() gives)" if hasattr(source, "to_pandas") else ""
        raise DataError(
            f"cannot load {part} from {type(source).__name__}; pass a path, a DataFrame or a Dataset{ours}"
        )
    path = Path(source).expanduser()
    if not path.exists() and _looks_like_hub_id(str(source)):
        dataset = _from_hub(str(source), part, {"revision": revision, "token": token})
        return None if dataset is None else _from_dataset(dataset, str(source))
    return _from_path(path, part, format, columns)


def _from_dataset(dataset: datasets.Dataset, where: str) -> Source:
    def read(chosen: list[str] | None) -> pa.Table:
        return to_table(dataset if chosen is None else dataset.select_columns(chosen))

    return Source(where, dataset.column_names, read)


def _from_path(path: Path, part: str, format: str, columns: dict[str, Any] | None) -> Source | None:
    located = detect_format(path, format).locate(path, part)
    if located is None:
        if part == "items":
            return None
        raise DataError(f"{path}: no interactions.* in this folder; name the log interactions.csv, .parquet, ...")
    found, file = located
    if isinstance(found, DelimitedFormat) and _are_positions(columns, found.column_names(file)):
        found = type(found)([int(place) for place in columns.values()])
    if part == "items":
        return Source(str(path), None, lambda _: found.read_items(file), found.hints)
    return Source(str(path), found.column_names(file), lambda chosen: found.read(file, chosen), found.hints)


def _are_positions(columns: dict[str, Any] | None, names: list[str] | None) -> bool:
    """
    Whether the caller numbers the columns, as one does for a table without a header. The values of its first line,
    which are taken for names, may well be such numbers: user 1, item 0.
    """
    given = [str(name) for name in (columns or {}).values()]
    places = [str(place) for place in range(len(names or given))]
    # Only a header that counts the columns, as pandas writes one for those without a name, says the same itself.
    return bool(given) and set(given) <= set(places) and names != places


def _looks_like_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w.-]*/[\w.-]+(:[\w.-]+)?", source)) and not source.lower().endswith(DATA_SUFFIXES)


def _from_hub(name: str, part: str, options: dict[str, Any]) -> datasets.Dataset | None:
    """
    A Hub dataset laid out like our folders (`interactions.*`, `items.*`), or else its only table as the log. A
    configuration follows the name after a colon.
    """
    repository, _, config = name.partition(":")
    if not config:
        try:
            return datasets.load_dataset(repository, data_files=f"{part}.*", split="train", **options)
        except DatasetNotFoundError as error:
            raise _hub_error(name, error) from error
        except FileNotFoundError:  # the dataset is there and holds no file of that name
            if part == "items":
                return None
        except Exception as error:
            raise _hub_error(name, error) from error
    try:
        splits = datasets.load_dataset(repository, **({"name": config} if config else {}), **options)
    except Exception as error:
        raise _hub_error(name, error) from error
    if len(splits) > 1:
        logger.warning("%s: its splits %s are joined in this order", name, ", ".join(splits))
    return datasets.concatenate_datasets(list(splits.values()))


def _hub_error(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: no such file or folder, nor a Hub dataset ({first_line(error)}); check the name")
