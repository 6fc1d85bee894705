# SPDX-License-Identifier: Apache-2.0
"""
The ways a log or a catalogue may lie on disk.

One small class per format: `matches_file` looks at the content (names lie), `read` gives the table as it is written
there, with the file's own column names. To add a format, write its class and put it into `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigurationError, DataError
from .base import Format, find_one, head, refuse_unreadable
from .jsons import (
    AmazonFormat,
    JSONArrayFormat,
    JSONLinesFormat,
    PythonLinesFormat,
    SteamFormat,
    YelpFormat,
    is_by_columns,
)
from .llm import (
    AttributesFormat,
    BIGRecFormat,
    DLLM2RecFormat,
    LCRecFormat,
    MiniOneRecInfoFormat,
    P5MapFormat,
    SemanticIDFormat,
)
from .movielens import LLaRAFormat, MovieLensFormat
from .tables import (
    BarFormat,
    CSVFormat,
    DelimitedFormat,
    HetRecFormat,
    ParquetFormat,
    RecBoleFormat,
    SemicolonFormat,
    TSVFormat,
)
from .text import E4SRecFormat, IDGenRecFormat, S3RecFormat, misread_table


__all__ = [
    "FORMATS",
    "DelimitedFormat",
    "FolderFormat",
    "Format",
    "detect_format",
    "format_names",
]


class FolderFormat(Format):
    """A folder holding `interactions.*` and, optionally, `items.*`, each in any of the file formats."""

    name = "folder"
    log_files = ("interactions.*",)
    item_files = ("items.*",)

    def matches_file(self, path: Path) -> bool:
        return False

    def locate(self, path: Path, part: str) -> tuple[Format, Path] | None:
        if path.is_file():
            raise DataError(f"{path}: is a file and no folder; leave the format out or name the file's own")
        file = find_one(path, self.log_files if part == "interactions" else self.item_files)
        if file is None:
            return None
        return detect_format(file), file


# The first one that matches is taken, so what is particular comes before what is general.
FORMATS: list[Format] = [
    FolderFormat(),
    ParquetFormat(),
    RecBoleFormat(),
    MovieLensFormat(),
    HetRecFormat(),
    AmazonFormat(),
    YelpFormat(),
    SteamFormat(),
    E4SRecFormat(),
    LCRecFormat(),
    AttributesFormat(),
    SemanticIDFormat(),
    P5MapFormat(),
    MiniOneRecInfoFormat(),
    BIGRecFormat(),
    DLLM2RecFormat(),
    LLaRAFormat(),
    IDGenRecFormat(),
    JSONArrayFormat(),
    JSONLinesFormat(),
    PythonLinesFormat(),
    TSVFormat(),
    CSVFormat(),
    SemicolonFormat(),
    BarFormat(),
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
        refuse_unreadable(path)
    elif not any(path.iterdir()):
        raise DataError(f"{path}: the folder is empty; check the path")
    for format in FORMATS:
        if format.name == name or (name == "auto" and format.matches(path)):
            return format
    raise DataError(f"{path}: format not recognised; {_hint(path)}")


def _hint(path: Path) -> str:
    """What a path in no known format is, where one can tell, and what to do."""
    known = f"known formats are {', '.join(format_names()[1:])} (choose one with `format`)"
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return "it was saved by `datasets`: pass datasets.load_from_disk(...), of several splits the one you mean"
        if any(path.glob("**/*.parquet")):
            return (
                "a folder of parquet files and others: name one file, or pass "
                'datasets.load_dataset("parquet", data_files=..., split="train")'
            )
        if any(path.glob("part-*")):
            return "a folder of parts: join them to one file, with the names of the columns in its first line alone"
        return known
    content = head(path)
    if content.startswith(b"PK\x03\x04"):
        return "this is a zip archive (or a spreadsheet, which is one): unzip it or save it as CSV"
    if content.startswith((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")):
        return "this is compressed: unpack it (gzip alone is read as it is)"
    if content.startswith((b"ARROW1", b"FEA1", b"ORC", b"Obj\x01", b"SQLite")):
        return "this is a file of Arrow, ORC, Avro or SQLite: write its table as parquet or CSV"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "this is UTF-16: save it as UTF-8"
    if is_by_columns(path):
        return "this is JSON by columns: write one object per row, or pass pandas.DataFrame(json.load(open(...)))"
    return misread_table(path) or known
