# SPDX-License-Identifier: Apache-2.0
"""A log made ready once: filtered, split, described, and kept on disk where training maps it into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from filelock import FileLock, Timeout

from ..errors import ConfigurationError, DataError
from ..files import file_facts, storage_errors_named, write_json
from .arrow import from_pandas, index_as_columns, to_table
from .card import data_card, render
from .filters import filter_interactions
from .formats import detect_format
from .interactions import load_interactions
from .items import FINAL_TEXT, load_items
from .sequences import split_by_ratio, split_by_time, split_leave_one_out
from .vocabulary import ItemVocabulary


logger = logging.getLogger(__name__)

SPLITS = {"leave_one_out": split_leave_one_out, "time": split_by_time, "ratio": split_by_ratio}
MANIFEST = "prepared.json"
LOCK_NAME = ".lock"
# What is read again. `data_card.md` is for people, who may write into it.
PARTS = ("interactions.parquet", "items.parquet", "vocabulary.json", "data_card.json", "sequences/**/*")
# Raised whenever the same source and options give another folder.
FORMAT_VERSION = 3
REMEDY = "Free some space, or give another output_dir."


@dataclass(frozen=True)
class PreparedData:
    """
    A prepared folder. Nothing is read before it is asked for, and the sequences are only mapped into memory. What is
    asked for after the folder was damaged, or prepared with other data or options, is a `DataError`.

    Args:
        folder (`Path`):
            Holds `interactions.parquet`, `items.parquet` (if there is a catalogue), `vocabulary.json`, `sequences/`,
            `data_card.json`, `data_card.md` and `prepared.json`.
        key (`str`):
            The hash of sources and options that the folder was opened with.
    """

    folder: Path
    key: str

    @cached_property
    def interactions(self) -> datasets.Dataset:
        """The filtered log."""
        return load_interactions(self._folder() / "interactions.parquet")

    @cached_property
    def items(self) -> datasets.Dataset | None:
        """The catalogue, if there is one."""
        file = self._folder() / "items.parquet"
        return load_items(file) if file.exists() else None

    @cached_property
    def vocabulary(self) -> ItemVocabulary:
        """The items of the log."""
        return ItemVocabulary.from_pretrained(self._folder())

    @cached_property
    def sequences(self) -> datasets.DatasetDict:
        """`train`, `validation` and `test`, memory-mapped."""
        return datasets.load_from_disk(str(self._folder() / "sequences"))

    @cached_property
    def card(self) -> dict[str, Any]:
        """What [`data_card`] returned."""
        return json.loads((self._folder() / "data_card.json").read_text(encoding="utf-8"))

    def _folder(self) -> Path:
        if _whole_key(self.folder) != self.key:
            raise DataError(
                f"{self.folder}: prepared again with other data or options since; open it with load_prepared"
            )
        return self.folder


def prepare(
    source: str | Path | pd.DataFrame | datasets.Dataset,
    items: str | Path | pd.DataFrame | datasets.Dataset | None = None,
    output_dir: str | Path | None = None,
    *,
    format: str = "auto",
    items_format: str = "auto",
    columns: dict[str, str | int] | None = None,
    item_columns: dict[str, str | int] | None = None,
    text_template: str | None = None,
    max_text_length: int = 512,
    duplicate_items: str = "refuse",
    split: str = "leave_one_out",
    with_floors: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    **filters: Any,
) -> PreparedData:
    """
    Loads a log and its catalogue, filters, splits and describes them, and keeps the result on disk.

    The folder remembers a hash of the sources' content and of the options: asked for the same again, it is returned as
    it is, or prepared again if it is damaged. Of several processes that ask at the same time, one prepares it and the
    others wait. A dataset on the Hub goes by its name and revision: newer data of it comes only with another
    `revision`, such as a commit.

    Args:
        source (`str`, `Path`, `pandas.DataFrame` or `datasets.Dataset`):
            The log; see [`load_interactions`].
        items (the same, *optional*):
            The catalogue; see [`load_items`]. By default the one in the log's folder or Hub dataset, if there is one.
        output_dir (`str` or `Path`, *optional*):
            The folder; by default one of that hash in the cache of `datasets`.
        format, items_format, columns, item_columns, text_template, max_text_length, duplicate_items, revision, token:
            Passed to [`load_interactions`] and [`load_items`].
        split (`str`, *optional*, defaults to `"leave_one_out"`):
            `"leave_one_out"`, `"time"` or `"ratio"`, at the default boundaries of the `split_*` functions.
        with_floors (`bool`, *optional*, defaults to `True`):
            Measure the floors of the data card.
        filters:
            Passed to [`filter_interactions`].

    Returns:
        [`PreparedData`]

    Raises:
        `DataError`, `ConfigurationError`: What the functions named above raise; or the folder holds a source whose
            place the result would take.
        `StorageError`: The folder cannot be written to.
    """
    if split not in SPLITS:
        raise ConfigurationError(f"split={split!r}; choose one of {', '.join(SPLITS)}")
    log_options = {"format": format, "columns": columns, "revision": revision, "token": token}
    item_options = {
        "format": items_format, "columns": item_columns, "revision": revision, "token": token,
        "text_template": text_template, "max_text_length": max_text_length, "duplicates": duplicate_items,
    }  # fmt: skip
    asked_for_items = items is not None
    if items is None and isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        items = source if path.is_dir() or not (path.exists() or ":" in str(source)) else None
        item_options["format"] = format
    key = _key([source, items], [log_options, item_options, split, with_floors, filters])
    folder = Path(output_dir).expanduser() if output_dir is not None else _cache_folder(key)
    if _holds(folder, key):
        return PreparedData(folder, key)
    sources = _files(source, "interactions", format) + _files(items, "items", item_options["format"])
    _refuse_to_overwrite(sources, folder)
    with _to_itself(folder):
        if _holds(folder, key):  # since the process that had it until now was at the same
            return PreparedData(folder, key)
        log = filter_interactions(load_interactions(source, **log_options), **filters)
        catalogue = None if items is None else load_items(items, **item_options)
        if catalogue is None and asked_for_items:
            raise DataError(f"{items}: holds no catalogue; give the file with the titles")
        vocabulary = ItemVocabulary.from_interactions(log, catalogue)
        sequences = SPLITS[split](log, vocabulary)
        for name, rows in sequences.items():
            if len(rows) == 0:
                raise DataError(f"no user has enough interactions for {name}; filter less or split otherwise")
        card = data_card(log, sequences, vocabulary, with_floors=with_floors)
        card["prepared"] = {"split": split, **{name: value for name, value in filters.items() if value is not None}}
        with storage_errors_named(folder, REMEDY):
            _write(folder, key, log, catalogue, vocabulary, sequences, card)
    return PreparedData(folder, key)


def is_prepared(source: str | Path) -> bool:
    """Whether `source` is a folder that [`prepare`] wrote."""
    return (Path(source).expanduser() / MANIFEST).is_file()


def load_prepared(folder: str | Path) -> PreparedData:
    """
    Opens a folder that [`prepare`] wrote.

    Raises:
        `DataError`: It is not there, not complete, damaged, or of another release's format.
    """
    folder = Path(folder).expanduser()
    return PreparedData(folder, _whole_key(folder))


def _key(sources: list[Any], options: Any) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, options], sort_keys=True, default=_plain).encode())
    for part, source, how in zip(("interactions", "items"), sources, options, strict=False):
        digest.update(f"\n{part}\n".encode())
        if source is not None:
            _add_content(digest, source, part, how["format"])
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """For JSON: NumPy's numbers as Python's, and what else it does not know, such as dates, as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _add_content(digest: Any, source: Any, part: str, format: str) -> None:
    """Files go by their bytes, tables by their values, and a Hub dataset by its name and revision."""
    if isinstance(source, (pd.DataFrame, datasets.Dataset)):
        table = from_pandas(index_as_columns(source)) if isinstance(source, pd.DataFrame) else to_table(source)
        table = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(pa.PythonFile(_HashSink(digest), "w"), table.schema) as writer:
            writer.write_table(table)
    else:
        files = _files(source, part, format)
        digest.update(b"" if files else str(source).encode())
        for file in files:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())


def _files(source: Any, part: str, format: str) -> list[Path]:
    """What of a source lies on disk: nothing of a table in memory or of a Hub dataset."""
    if not isinstance(source, (str, Path)):
        return []
    path = Path(source).expanduser()
    if not path.exists():
        return []
    if path.is_file():
        return [path]
    located = detect_format(path, format).locate(path, part)
    if located is None:
        return []
    return [located[1]] if located[1].is_file() else sorted(file for file in located[1].iterdir() if file.is_file())


def _refuse_to_overwrite(files: list[Path], folder: Path) -> None:
    """A source that goes by a name of the prepared files would be lost, or be a second log beside them."""
    for file in files:
        if file.parent.resolve() == folder.resolve() and file.name.split(".")[0] in ("interactions", "items"):
            raise ConfigurationError(
                f"output_dir {folder} holds the source {file.name}, whose place the prepared data would take; "
                "give another output_dir"
            )


class _HashSink:
    """A file that keeps nothing of what is written but its hash."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self.digest = digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _cache_folder(key: str) -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "llmd4rec_hf" / key[:32]


def _whole_key(folder: Path) -> str:
    """The key of a folder that is as it was written; any other is a `DataError`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no complete prepared data here ({MANIFEST} is missing); prepare it again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, key = manifest["format_version"], manifest["key"]
        files = dict(manifest["files"]) if version == FORMAT_VERSION else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{MANIFEST}: {type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{folder}: format version {version}, this release reads {FORMAT_VERSION}; prepare it again")
    altered = next((name for name, facts in files.items() if _facts(folder / name) != facts), None)
    if altered is not None:
        raise _damaged(folder, f"{altered} is missing, torn or altered")
    return key


def _damaged(folder: Path, what: str) -> DataError:
    return DataError(f"{folder}: damaged ({what}); delete the folder or prepare it again")


def _facts(path: Path) -> dict[str, Any] | None:
    """What tells whether a file is as it was written: of the tables, which may be gigabytes, the size has to do."""
    try:
        return file_facts(path) if path.suffix == ".json" else {"bytes": path.stat().st_size}
    except OSError:  # also one that another process takes away just now, to prepare it again
        return None


def _holds(folder: Path, key: str) -> bool:
    if not is_prepared(folder):
        return False
    try:
        held = _whole_key(folder) == key
    except DataError as error:
        logger.warning("%s. It is prepared again now.", error)
        return False
    if held:
        logger.info("%s holds this data already", folder)
    return held


@contextmanager
def _to_itself(folder: Path) -> Iterator[None]:
    """Several processes of a run, or runs that begin together, write one after the other. The system ends the lock."""
    lock = FileLock(folder / LOCK_NAME)
    with storage_errors_named(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("%s is being prepared by another process, which is waited for", folder)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write(
    folder: Path,
    key: str,
    log: datasets.Dataset,
    catalogue: datasets.Dataset | None,
    vocabulary: ItemVocabulary,
    sequences: datasets.DatasetDict,
    card: dict[str, Any],
) -> None:
    """The manifest goes first and comes last, so a folder that has one is whole."""
    described = json.dumps(card, indent=2, default=_plain) + "\n"  # before anything that is there is lost
    (folder / MANIFEST).unlink(missing_ok=True)
    table = to_table(log)
    if "position" in table.column_names:  # `timestamp` only repeats it, and read again it would pass for a clock
        table = table.drop_columns("timestamp")
    pa.parquet.write_table(table, folder / "interactions.parquet")
    if catalogue is None:
        (folder / "items.parquet").unlink(missing_ok=True)
    else:
        items = to_table(catalogue).replace_schema_metadata({FINAL_TEXT: b"1"})
        pa.parquet.write_table(items, folder / "items.parquet")
    vocabulary.save_pretrained(folder)
    shutil.rmtree(folder / "sequences", ignore_errors=True)
    with _no_progress_bars():
        sequences.save_to_disk(folder / "sequences")
    (folder / "data_card.json").write_text(described, encoding="utf-8")
    (folder / "data_card.md").write_text(render(card), encoding="utf-8")
    parts = (path for part in PARTS for path in sorted(folder.glob(part)) if path.is_file())
    files = {path.relative_to(folder).as_posix(): _facts(path) for path in parts}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, "key": key, "files": files})


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
