# SPDX-License-Identifier: Apache-2.0
"""Tables that name their columns: parquet and delimited text, alone or as the parts of a folder."""

from __future__ import annotations

import csv
import io
import logging
import math
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet

from ...errors import DataError, first_line
from ..columns import is_known
from .base import Format, first_text_line, head, head_lines, infer_types, read_delimited, text_head


logger = logging.getLogger(__name__)

T = TypeVar("T")


class ParquetFormat(Format):
    """
    An Apache Parquet file, or a folder of files that are the parts of one table, as Spark writes it. Types are kept,
    and only the needed columns are read.
    """

    name = "parquet"

    def matches(self, path: Path) -> bool:
        files = self._files(path)
        return bool(files) and all(file.is_file() and self.matches_file(file) for file in files)

    def matches_file(self, path: Path) -> bool:
        return head(path).startswith(b"PAR1")

    def locate(self, path: Path, part: str) -> tuple[Format, Path] | None:
        # A log has no catalogue in its folder; a folder that is one has no users.
        if path.is_dir() and part == "items" and any(is_known(name, "user_id") for name in self.column_names(path)):
            return None
        return self, path

    def column_names(self, path: Path) -> list[str]:
        # Of all parts: a first one without times must not make a log of which nobody knows the order.
        schemas = [self._read(pa.parquet.read_schema, part) for part in self._parts(path)]
        return list(dict.fromkeys(name for schema in schemas for name in schema.names))

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        options = {"columns": columns, "partitioning": None}
        tables = [self._read(pa.parquet.read_table, part, **options) for part in self._parts(path)]
        try:
            return pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(
                f"{path}: its parts are of different types ({first_line(error)}); write them anew"
            ) from error

    @staticmethod
    def _read(read: Callable[..., T], part: Path, **options: Any) -> T:
        try:
            return read(part, memory_map=True, **options)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{part}: damaged parquet file ({first_line(error)}); write it again") from error

    def _parts(self, path: Path) -> list[Path]:
        """The files of one table are called alike but for their numbers: neither splits, nor a log and its items."""
        files = self._files(path)
        names = ", ".join(file.name for file in files[:4])
        if len({re.split("[0-9]", file.name)[0] for file in files}) != 1:
            raise DataError(
                f"{path}: the files ({names}) are not called like the parts of one table; name one, or pass "
                'datasets.load_dataset("parquet", data_files=..., split="train") for several'
            )
        return files

    @staticmethod
    def _files(path: Path) -> list[Path]:
        """Without what writers leave beside; `part.10` comes after `part.9`."""
        files = [path] if path.is_file() else [file for file in path.iterdir() if file.name[0] not in "._"]
        return sorted(files, key=lambda file: (len(file.name), file.name))


class DelimitedFormat(Format):
    """
    A text table whose first line names the columns, optionally gzipped, UTF-8 (or else Windows-1252).

    Every column is read as text and becomes a number only where no character is lost, so ids such as `00123` survive.

    Args:
        numbered (`list[int]`, *optional*):
            The columns that are wanted, where the caller numbers them: all columns are then called `"0"`, `"1"`, ...,
            and the first line is a header only if it looks like one there.
    """

    delimiter: str
    quote: str | bool = '"'

    def __init__(self, numbered: list[int] | None = None) -> None:
        self.numbered = numbered

    def matches_file(self, path: Path) -> bool:
        line = first_text_line(path)
        others = set("\t,;|") - {self.delimiter}
        return self.delimiter in line and not others & set(line) and line[0] not in "{["

    def column_names(self, path: Path) -> list[str]:
        fields = self._rows(path, 1)[0]
        return self.named(fields) if self.numbered is None else [str(place) for place in range(len(fields))]

    def named(self, fields: list[str]) -> list[str]:
        """The columns' names from the fields of a header."""
        return fields

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        names = self.column_names(path)
        kind, fields = ("header", self._rows(path, 1)[0]) if self._has_header(path) else ("names", names)
        # Arrow finds a column by its name, so doubled names are read whole and refused where columns are chosen.
        if columns is None or len(set(fields)) < len(fields):
            wanted = None
        else:
            wanted, names = [fields[names.index(name)] for name in columns], columns
        table = read_delimited(path, self.delimiter, quote=self._quote(path), columns=wanted, **{kind: fields})
        return infer_types(table.rename_columns(names))

    def _quote(self, path: Path) -> str | bool:
        """The format's own or, where every name in the first line stands in quotes, as R writes them, such quotes."""
        if self.quote:
            return self.quote
        names = first_text_line(path).split(self.delimiter)
        return '"' if all(re.fullmatch('".*"', name) for name in names) else False

    def _has_header(self, path: Path) -> bool:
        """Numbered columns have one if the first line holds no number in them and all further ones do in some."""
        if self.numbered is None:
            return True
        first, *rest = (
            [row[place] if place < len(row) else "" for place in self.numbered] for row in self._rows(path)
        )
        if not rest or any(map(_is_number, first)):
            return False
        found = any(all(map(_is_number, values)) for values in zip(*rest, strict=True))
        if found:
            logger.warning("%s: the first line, %s, holds no number: it is taken as a header", path, ", ".join(first))
        return found

    def _rows(self, path: Path, count: int = 20) -> list[list[str]]:
        quoting = csv.QUOTE_MINIMAL if self._quote(path) else csv.QUOTE_NONE
        # All of the head, not line by line: a quoted name may hold a line break.
        rows = csv.reader(io.StringIO(text_head(path), newline=""), delimiter=self.delimiter, quoting=quoting)
        rows = list(islice(filter(None, rows), count))
        if not rows:
            raise DataError(f"{path}: holds no lines of text; check how it was written")
        return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


class CSVFormat(DelimitedFormat):
    """Comma-separated values; fields may be quoted and hold line breaks."""

    name = "csv"
    delimiter = ","

    def matches_file(self, path: Path) -> bool:
        line = first_text_line(path)
        return "," in line and "\t" not in line and line[0] not in "{[" and not SemicolonFormat().matches_file(path)


class TSVFormat(DelimitedFormat):
    """
    Tab-separated values, quoted only where all their names are: elsewhere a stray `"` in a title must not swallow the
    rows after it.
    """

    name = "tsv"
    delimiter = "\t"
    quote = False

    def matches_file(self, path: Path) -> bool:
        return "\t" in first_text_line(path)


class SemicolonFormat(DelimitedFormat):
    """Values separated by semicolons, as spreadsheets write them in half of Europe (Book-Crossing, for one)."""

    name = "semicolon"
    delimiter = ";"

    def matches_file(self, path: Path) -> bool:
        if super().matches_file(path):
            return True
        # Commas may be those of decimals then; a list within a field of CSV is as long as it happens to be.
        lines = head_lines(path)
        alike = len({line.count(";") for line in lines}) == 1
        # As many commas in every line, and not all within numbers, are those of CSV, with lists between semicolons.
        listed = len({line.count(",") for line in lines}) == 1 and re.search(r"(?<!\d),|,(?!\d)", "\n".join(lines))
        return alike and not listed and lines[0].count(";") > lines[0].count(",") and not set(lines[0]) & set("\t|{[")


class BarFormat(DelimitedFormat):
    """Values separated by vertical bars, quoted as those of [`TSVFormat`]."""

    name = "bar"
    delimiter = "|"
    quote = False


class RecBoleFormat(TSVFormat):
    """
    Atomic files of [RecBole](https://recbole.io/docs/user_guide/data/atomic_files.html): tab-separated, `name:type` in
    the first line. A folder holds `NAME.inter` and, optionally, `NAME.item`.
    """

    name = "recbole"
    log_files = ("*.inter",)
    item_files = ("*.item",)

    def matches_file(self, path: Path) -> bool:
        fields = first_text_line(path).split("\t")
        return all(re.fullmatch(r"[^:]+:(token|token_seq|float|float_seq)", field) for field in fields)

    def named(self, fields: list[str]) -> list[str]:
        return [field.rsplit(":", 1)[0] for field in fields]


class HetRecFormat(TSVFormat):
    """
    Last.fm of HetRec 2011: `user_artists.dat` (play counts, no times) or `user_taggedartists-timestamps.dat`, and
    `artists.dat`.
    """

    name = "hetrec"
    hints = {"item_id": ("artistID", "id"), "title": ("name",)}
    log_files = ("user_artists.dat", "user_taggedartists-timestamps.dat")
    item_files = ("artists.dat",)

    def matches_file(self, path: Path) -> bool:
        line = first_text_line(path)
        return line.startswith("userID\tartistID") or line.split("\t") == ["id", "name", "url", "pictureURL"]

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        if "weight" in self.column_names(path):
            logger.warning("%s: holds play counts and no times, so the order of a user's artists means nothing", path)
        return super().read(path, columns)
