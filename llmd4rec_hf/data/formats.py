# SPDX-License-Identifier: Apache-2.0
"""
The ways a log or a catalogue may lie on disk.

One small class per format: `matches` looks at the content (names lie), `read` gives the table as it is written
there, with the file's own column names. To add a format, write its class and put it into `FORMATS`.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from ..errors import ConfigurationError, DataError


logger = logging.getLogger(__name__)

HEAD_BYTES = 1 << 16


class Format:
    """
    One way to store a log. Subclasses set `name` (what `format=` and `--format` call it) and give the methods below.
    """

    name: str

    def matches(self, path: Path) -> bool:
        """Whether `path` holds this format, judged by its content."""
        raise NotImplementedError

    def read(self, path: Path) -> pa.Table:
        """The interactions in `path`, with the file's own column names, in file order."""
        raise NotImplementedError

    def read_items(self, path: Path) -> pa.Table | None:
        """The catalogue in `path`; a single file is the catalogue itself, a folder may hold none (`None`)."""
        return self.read(path)


class ParquetFormat(Format):
    """An Apache Parquet file; its types are kept."""

    name = "parquet"

    def matches(self, path: Path) -> bool:
        return path.is_file() and head(path).startswith(b"PAR1")

    def read(self, path: Path) -> pa.Table:
        try:
            return pa.parquet.read_table(path, memory_map=True, partitioning=None)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: damaged parquet file ({first_line(error)}); write it again") from error


class JSONLinesFormat(Format):
    """One JSON object per line, optionally gzipped; its types are kept."""

    name = "jsonl"

    def matches(self, path: Path) -> bool:
        line = first_text_line(path)
        if not line.startswith("{"):
            return False
        try:
            return isinstance(json.loads(line), dict)
        except ValueError:
            return False

    def read(self, path: Path) -> pa.Table:
        # A large block: an object longer than the block is an error in Arrow.
        options = pa.json.ReadOptions(block_size=1 << 25)
        try:
            with open_binary(path) as stream:
                return pa.json.read_json(stream, read_options=options)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not valid JSON lines ({first_line(error)}); mend or drop that line") from error


class DelimitedFormat(Format):
    """
    A text table whose first line names the columns, optionally gzipped, UTF-8 (or else Latin-1).

    Every column is read as text and becomes a number only where no character is lost, so ids such as `00123` survive.
    """

    delimiter: str
    quote: str | bool

    def matches(self, path: Path) -> bool:
        return self.delimiter in first_text_line(path)

    def read(self, path: Path) -> pa.Table:
        try:
            table = self._parse(path, "utf8")
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise DataError(f"{path}: {first_line(error)}; mend that row") from error
            logger.info("%s is not UTF-8: reading it as Latin-1", path)
            table = self._parse(path, "latin-1")
        return infer_types(table)

    def _parse(self, path: Path, encoding: str) -> pa.Table:
        line = head(path).decode(encoding, errors="replace").lstrip("\ufeff").splitlines()[0]
        names = next(csv.reader([line], delimiter=self.delimiter))
        with open_binary(path) as stream:
            return pa.csv.read_csv(
                stream,
                read_options=pa.csv.ReadOptions(encoding=encoding, block_size=1 << 24),
                parse_options=pa.csv.ParseOptions(
                    delimiter=self.delimiter, quote_char=self.quote, newlines_in_values=bool(self.quote)
                ),
                convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
            )


class CSVFormat(DelimitedFormat):
    """Comma-separated values; fields may be quoted and hold line breaks."""

    name = "csv"
    delimiter = ","
    quote = '"'

    def matches(self, path: Path) -> bool:
        line = first_text_line(path)
        return "," in line and "\t" not in line and line[0] not in "{["


class TSVFormat(DelimitedFormat):
    """Tab-separated values, never quoted: a stray `"` in a title must not swallow the rows after it."""

    name = "tsv"
    delimiter = "\t"
    quote = False


class S3RecFormat(Format):
    """
    Lines of `user item item ...`, oldest item first, as in [S3-Rec](https://huggingface.co/papers/2008.07873).

    A user may come on several lines, so the `user item` pairs of SASRec.pytorch are read too.
    """

    name = "s3rec"

    def matches(self, path: Path) -> bool:
        # Only whole lines count, and the head may end inside one.
        lines = text_head(path).splitlines()[:20]
        return bool(lines) and all(
            not set(line) & set(',\t{}[]"') and len(line.split()) >= 2 for line in lines if line.strip()
        )

    def read(self, path: Path) -> pa.Table:
        with open_binary(path) as stream:
            lines = pa.array(stream.read().decode("utf-8", errors="replace").splitlines(), pa.string())
        lines = pc.utf8_trim_whitespace(lines)
        lines = lines.filter(pc.not_equal(lines, ""))
        fields = pc.utf8_split_whitespace(lines)
        counts = fields.value_lengths().to_numpy()
        if (counts < 2).any():
            line = int((counts < 2).argmax())
            raise DataError(f"{path}: line {line + 1} holds a user and no item; drop the line or add its items")
        tokens = fields.flatten()
        starts = np.cumsum(counts) - counts
        is_user = np.zeros(len(tokens), bool)
        is_user[starts] = True
        users = tokens.take(pa.array(np.repeat(starts, counts - 1)))
        return infer_types(pa.table({"user_id": users, "item_id": tokens.filter(pa.array(~is_user))}))


class FolderFormat(Format):
    """A folder holding `interactions.*` and, optionally, `items.*`, each in any of the file formats."""

    name = "folder"

    def matches(self, path: Path) -> bool:
        return path.is_dir() and any(path.glob("interactions.*"))

    def read(self, path: Path) -> pa.Table:
        file = self._find(path, "interactions")
        if file is None:
            raise DataError(f"{path}: no interactions.* in this folder; name the log interactions.csv, .parquet, ...")
        return detect_format(file).read(file)

    def read_items(self, path: Path) -> pa.Table | None:
        file = self._find(path, "items")
        return None if file is None else detect_format(file).read(file)

    @staticmethod
    def _find(path: Path, stem: str) -> Path | None:
        files = sorted(path.glob(f"{stem}.*"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{path}: holds {names}; keep one of them or name the file itself")
        return files[0] if files else None


FORMATS: list[Format] = [
    FolderFormat(),
    ParquetFormat(),
    JSONLinesFormat(),
    TSVFormat(),
    CSVFormat(),
    S3RecFormat(),
]


def format_names() -> list[str]:
    """Every name `format=` accepts."""
    return ["auto", *(format.name for format in FORMATS)]


def detect_format(path: Path, name: str = "auto") -> Format:
    """
    The format of `path`.

    Args:
        path (`Path`):
            An existing file or folder.
        name (`str`, *optional*, defaults to `"auto"`):
            The format to use; `"auto"` takes the first one of `FORMATS` that matches the content.

    Raises:
        `DataError`: The file is missing, empty, a pickle, or in no known format.
    """
    if name not in format_names():
        raise ConfigurationError(f"format {name!r} is unknown; choose one of {', '.join(format_names())}")
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        _refuse_unreadable(path)
    for format in FORMATS:
        if format.name == name or (name == "auto" and format.matches(path)):
            return format
    names = ", ".join(format_names()[1:])
    raise DataError(f"{path}: format not recognised; known formats are {names} (choose one with `format`)")


def _refuse_unreadable(path: Path) -> None:
    content = head(path)
    if not content.strip():
        raise DataError(f"{path}: the file is empty; check how it was written")
    # Protocols 2 and up start with \x80 and their number; older ones are text that begins with an opcode.
    is_pickle = content[0] == 0x80 and len(content) > 1 and content[1] <= 9
    if is_pickle or content.startswith((b"(dp", b"(lp", b"ccopy_reg", b"cpandas", b"cnumpy")):
        raise DataError(
            f"{path}: this is a pickle, which can run code when loaded and is never read; save it as CSV or parquet"
        )


def infer_types(table: pa.Table) -> pa.Table:
    """Turns text columns into numbers where every value allows it without losing a character (`007` stays text)."""
    return pa.table([_infer(column) for column in table.columns], names=table.column_names)


def _infer(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        integers = column.cast(pa.int64())
        if integers.cast(pa.string()).equals(column):
            return integers
    except pa.ArrowInvalid:
        pass
    try:
        numbers = column.cast(pa.float64())
        if pc.all(pc.match_substring_regex(column, r"^-?[0-9]+\.[0-9]+$")).as_py():
            return numbers
    except pa.ArrowInvalid:
        pass
    return column


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for reading, through gzip where the content is gzipped; a torn file is a `DataError`."""
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else open(path, "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); check the file") from error


def head(path: Path) -> bytes:
    """The first bytes of the (unzipped) content; nothing for a folder."""
    if path.is_dir():
        return b""
    with open_binary(path) as stream:
        return stream.read(HEAD_BYTES)


def text_head(path: Path) -> str:
    """The first whole lines of a text file; empty for binary content."""
    content = head(path)
    if b"\x00" in content:
        return ""
    if len(content) == HEAD_BYTES and b"\n" in content:
        content = content[: content.rindex(b"\n")]
    return content.decode("utf-8", errors="replace").lstrip("\ufeff")


def first_text_line(path: Path) -> str:
    """The first line of a text file that is not blank, or an empty string."""
    return next((line for line in text_head(path).splitlines() if line.strip()), "")


def first_line(error: Exception) -> str:
    """An error of a library cut to one line."""
    return str(error).strip().split("\n")[0]
