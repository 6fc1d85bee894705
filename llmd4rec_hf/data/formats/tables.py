# SPDX-License-Identifier: Apache-2.0
"""Tables that name their columns: parquet and delimited text, alone or as the parts of a folder."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from ...errors import DataError, first_line
from .base import Format, first_text_line, head, infer_types, read_delimited


logger = logging.getLogger(__name__)


class ParquetFormat(Format):
    """An Apache Parquet file; its types are kept, and only the needed columns are read."""

    name = "parquet"

    def matches_file(self, path: Path) -> bool:
        return head(path).startswith(b"PAR1")

    def column_names(self, path: Path) -> list[str]:
        try:
            return pa.parquet.read_schema(path, memory_map=True).names
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: damaged parquet file ({first_line(error)}); write it again") from error

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        try:
            return pa.parquet.read_table(path, columns=columns, memory_map=True, partitioning=None)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: damaged parquet file ({first_line(error)}); write it again") from error


class DelimitedFormat(Format):
    """
    A text table whose first line names the columns, optionally gzipped, UTF-8 (or else Windows-1252).

    Every column is read as text and becomes a number only where no character is lost, so ids such as `00123` survive.

    Args:
        has_header (`bool`, *optional*, defaults to `True`):
            `False` where the first line already holds values; the columns are then called `"0"`, `"1"`, ...
    """

    delimiter: str
    quote: str | bool = '"'

    def __init__(self, has_header: bool = True) -> None:
        self.has_header = has_header

    def matches_file(self, path: Path) -> bool:
        line = first_text_line(path)
        others = set("\t,;|") - {self.delimiter}
        return self.delimiter in line and not others & set(line) and line[0] not in "{["

    def column_names(self, path: Path) -> list[str]:
        fields = next(csv.reader([first_text_line(path)], delimiter=self.delimiter))
        return fields if self.has_header else [str(index) for index in range(len(fields))]

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        names = self.column_names(path)
        # Arrow finds a column by its name, so doubled names are read whole and refused where columns are chosen.
        columns = columns if len(set(names)) == len(names) else None
        kind = "header" if self.has_header else "names"
        return infer_types(read_delimited(path, self.delimiter, quote=self.quote, columns=columns, **{kind: names}))


class CSVFormat(DelimitedFormat):
    """Comma-separated values; fields may be quoted and hold line breaks."""

    name = "csv"
    delimiter = ","

    def matches_file(self, path: Path) -> bool:
        line = first_text_line(path)
        return "," in line and "\t" not in line and line[0] not in "{["


class TSVFormat(DelimitedFormat):
    """Tab-separated values, never quoted: a stray `"` in a title must not swallow the rows after it."""

    name = "tsv"
    delimiter = "\t"
    quote = False

    def matches_file(self, path: Path) -> bool:
        return "\t" in first_text_line(path)


class SemicolonFormat(DelimitedFormat):
    """Values separated by semicolons, as spreadsheets write them in half of Europe (Book-Crossing, for one)."""

    name = "semicolon"
    delimiter = ";"


class BarFormat(DelimitedFormat):
    """Values separated by vertical bars, never quoted."""

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

    def column_names(self, path: Path) -> list[str]:
        return [field.rsplit(":", 1)[0] for field in super().column_names(path)]

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        typed = super().column_names(path)
        names = self.column_names(path)
        wanted = None if columns is None else [typed[names.index(name)] for name in columns]
        table = read_delimited(path, "\t", header=typed, columns=wanted)
        return infer_types(table.rename_columns([name.rsplit(":", 1)[0] for name in table.column_names]))


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
