# SPDX-License-Identifier: Apache-2.0
"""What every format has in common, and the ways into a file that formats share."""

from __future__ import annotations

import codecs
import gzip
import io
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ...errors import DataError, first_line
from ..arrow import first_true


logger = logging.getLogger(__name__)

T = TypeVar("T")

HEAD_BYTES = 1 << 16
# No line of text holds this character, so a reader of tables takes a line as one field.
UNIT_SEPARATOR = "\x1f"


class Format:
    """
    One way to store a log or a catalogue. Subclasses set `name` and give `matches_file` and `read`.

    Attributes:
        name (`str`):
            What `format=` and `--format` call it.
        hints (`dict[str, tuple[str, ...]]`):
            Our column names, each with those of this format where the common names would mislead, best first.
        log_files, item_files (`tuple[str, ...]`):
            Patterns of the names that log and catalogue have where they lie together in a folder.
    """

    name: str
    hints: dict[str, tuple[str, ...]] = {}
    log_files: tuple[str, ...] = ()
    item_files: tuple[str, ...] = ()

    def matches_file(self, path: Path) -> bool:
        """Whether the file `path` holds this format, judged by its content: names lie."""
        raise NotImplementedError

    def matches(self, path: Path) -> bool:
        """Whether `path`, a file or a folder, holds this format."""
        if path.is_dir():
            return any(any(path.glob(pattern)) for pattern in self.log_files)
        return self.matches_file(path)

    def locate(self, path: Path, part: str) -> tuple[Format, Path] | None:
        """The format and file of `part` ("interactions" or "items") of `path`; `None` where it has none."""
        if path.is_file():
            return self, path
        file = find_one(path, self.log_files if part == "interactions" else self.item_files)
        if file is None:
            return None
        refuse_unreadable(file)
        return self, file

    def column_names(self, path: Path) -> list[str] | None:
        """The column names in the file, where they can be had without reading it; else `None`."""
        return None

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        """
        The rows of the file, with its own column names and in its own order.

        Args:
            path (`Path`):
                A file that [`~Format.locate`] gave.
            columns (`list[str]`, *optional*):
                What is needed. Formats that name their columns read no others; the rest give all they have.
        """
        raise NotImplementedError

    def read_items(self, path: Path) -> pa.Table:
        """The catalogue in the file."""
        return self.read(path)


def find_one(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """The file that the first matching pattern means; several are an error, none is `None`."""
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise DataError(f"{folder}: holds {names}; keep one of them or name the file itself")
        if files:
            return files[0]
    return None


def refuse_unreadable(path: Path) -> None:
    """Raises for an empty file and for a pickle, whatever its name."""
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
    """
    Turns text columns into numbers where every value allows it without losing a character (`007` stays text, and so
    does `10.50`), or where all are what pandas makes of integers (`7.0`).
    """
    names, columns = table.column_names, table.columns
    del table  # so that the text of a column is freed as soon as its numbers are there
    for index in range(len(columns)):
        columns[index] = _infer(columns[index])
    return pa.table(columns, names=names)


def _infer(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type):
        return column
    try:
        integers = [_integers(chunk) for chunk in column.chunks]
        return pa.chunked_array(integers, pa.int64())
    except pa.ArrowInvalid:
        pass
    try:
        numbers = column.cast(pa.float64())
        if pc.all(pc.match_substring_regex(column, r"^-?(0|[1-9][0-9]*)\.0$")).as_py():
            return numbers
    except pa.ArrowInvalid:
        pass
    return column


def _integers(chunk: pa.Array) -> pa.Array:
    integers = chunk.cast(pa.int64())
    if not integers.cast(pa.string()).equals(chunk):
        raise pa.ArrowInvalid("an integer would not be written as it is here")
    return integers


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


def head(path: Path, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of the (unzipped) content; nothing for a folder."""
    if path.is_dir():
        return b""
    with open_binary(path) as stream:
        return stream.read(size)


def text_head(path: Path, size: int = HEAD_BYTES) -> str:
    """The first whole lines of a text file; empty for binary content."""
    content = head(path, size)
    if b"\x00" in content:
        return ""
    if len(content) == size and b"\n" in content:
        content = content[: content.rindex(b"\n")]
    return _text(content)


def text_tail(path: Path, size: int = HEAD_BYTES) -> str:
    """The last whole lines of a text file; empty for a gzipped one, all of which would have to be read for them."""
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return ""
        start = max(file.seek(0, os.SEEK_END) - size, 0)
        file.seek(start)
        content = file.read()
    return _text(content[content.find(b"\n") + 1 :] if start else content)


def _text(content: bytes) -> str:
    texts = (_beginning(content, encoding) for encoding in ("utf-8", "cp1252", "latin-1"))
    return next(text for text in texts if text is not None).lstrip("\ufeff")


def _beginning(content: bytes, encoding: str) -> str | None:
    """The beginning of a file as text, if it is in `encoding`; it may end within a character."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(content)
    except UnicodeDecodeError:
        return None


def encodings(path: Path, content: bytes | None = None) -> Iterator[str]:
    """
    How to decode `path`, or its `content`: as UTF-8; where that fails, as Windows-1252, which is Latin-1 with quotes
    and dashes; and where that has no such character, as Latin-1, which cannot fail.
    """
    # The head is looked at because Arrow says of values that they are not UTF-8, of a table's header it does not.
    if _beginning(head(path) if content is None else content[:HEAD_BYTES], "utf-8") is None:
        logger.info("%s is not UTF-8: reading it as Windows-1252", path)
    else:
        yield "utf-8"
        logger.warning("%s begins as UTF-8 and does not go on so: reading it as Windows-1252", path)
    yield "cp1252"
    logger.info("%s is not Windows-1252 either: reading it as Latin-1", path)
    yield "latin-1"


def decoded(path: Path, read: Callable[[str], T]) -> T:
    """What `read` makes of `path` by the first of its encodings in which nothing fails to decode."""
    for encoding in encodings(path):
        try:
            return read(encoding)
        except UnicodeDecodeError:
            continue
    raise AssertionError("Latin-1 decodes everything")


def head_lines(path: Path, count: int = 20) -> list[str]:
    """The first lines of a text file that are not blank. Lines end as they do for Arrow, old Macs' ways included."""
    return text_lines(text_head(path))[:count]


def text_lines(text: str) -> list[str]:
    """The lines that are not blank. Only what ends lines in files parts them: U+2028 may stand in a value."""
    return [line for line in re.split(r"\r\n?|\n", text) if line.strip()]


def first_text_line(path: Path) -> str:
    """The first line of a text file that is not blank, or an empty string."""
    return next(iter(head_lines(path, 1)), "")


def read_lines(path: Path) -> pa.ChunkedArray:
    """All lines that are not blank, trimmed."""
    return pc.utf8_trim_whitespace(read_delimited(path, UNIT_SEPARATOR, names=["line"])["line"])


def read_names(path: Path, separator: str) -> pa.Table:
    """A catalogue of lines that hold an item, a separator and the item's name."""
    fields = pc.split_pattern(read_lines(path), separator, max_splits=1)
    row = first_true(pc.less(pc.list_value_length(fields), 2))
    if row is not None:
        raise DataError(f"{path}: line {row + 1} holds no {separator!r} before a name; mend it or name another format")
    return pa.table({"item_id": pc.list_element(fields, 0), "title": pc.list_element(fields, 1)})


def read_delimited(
    path: Path,
    delimiter: str,
    *,
    quote: str | bool = False,
    names: list[str] | None = None,
    header: list[str] | None = None,
    columns: list[str] | None = None,
    content: bytes | None = None,
) -> pa.Table:
    """
    A text table with every column as text.

    Args:
        path (`Path`):
            The file, optionally gzipped, in any of the [`encodings`].
        delimiter (`str`):
            One character.
        quote (`str` or `bool`, *optional*, defaults to `False`):
            The character around fields that hold delimiters or line breaks; `False` where there is none.
        names (`list[str]`, *optional*):
            The columns' names, where the first line already holds values.
        header (`list[str]`, *optional*):
            What the first line names, where it does.
        columns (`list[str]`, *optional*):
            The columns to read; all by default.
        content (`bytes`, *optional*):
            Read instead of the file, which then only names it in errors.
    """
    text = dict.fromkeys(names or header or [], pa.string())
    parse = pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char=quote,
        newlines_in_values=bool(quote),
        escape_char="\\" if quote and _escapes_quotes(text_head(path), quote, delimiter) else False,
    )
    convert = pa.csv.ConvertOptions(column_types=text, include_columns=columns)
    for encoding in encodings(path, content):
        read = pa.csv.ReadOptions(encoding=encoding, block_size=1 << 24, column_names=names)
        try:
            with open_binary(path) if content is None else pa.BufferReader(content) as stream:
                lines = _CountedLines(stream) if quote else stream
                table = pa.csv.read_csv(lines, read_options=read, parse_options=parse, convert_options=convert)
        except UnicodeDecodeError:
            continue
        except pa.ArrowKeyError as error:  # its head is in another encoding than the rest
            raise DataError(f"{path}: {first_line(error)} as {encoding}; save the file as UTF-8") from error
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error) or encoding == "latin-1":
                raise DataError(f"{path}: {first_line(error)}; mend that row") from error
            continue
        within = lines.count - table.num_rows - (names is None) if quote else 0
        if within > 0:
            logger.warning(
                "%s: %d line breaks lie within quotes; if its texts have none, a stray quote has swallowed rows: "
                "double the quotes in texts",
                path,
                within,
            )
        return table
    raise AssertionError("Latin-1 decodes everything")


class _CountedLines(io.RawIOBase):
    """A stream that counts the lines read from it, without those that are empty."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.ends = 0
        self.last = b"\n"

    @property
    def count(self) -> int:
        return self.ends + (self.last != b"\n")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(size)
        self.ends += block.count(b"\n")
        seam = self.last + block
        if b"\n\n" in seam or b"\n\r\n" in seam:
            self.ends -= len(re.findall(rb"\n(?=\r?\n)", seam))
        self.last = seam[-1:]
        return block


def _escapes_quotes(text: str, quote: str, delimiter: str) -> bool:
    """
    Whether a quote in a quoted field has a backslash before it, as Spark and MySQL write it. One that is doubled, or
    that ends the field, may follow a backslash of the text.
    """
    within = rf"(^|[{delimiter}\r\n]){quote}[^{quote}]*\\{quote}"
    return re.search(rf"{within}([^{quote}{delimiter}\r\n]|{quote}[{delimiter}\r\n])", text) is not None
