# SPDX-License-Identifier: Apache-2.0
"""
The ways a log or a catalogue may lie on disk.

One small class per format: `matches_file` looks at the content (names lie), `read` gives the table as it is written
there, with the file's own column names. To add a format, write its class and put it into `FORMATS`.
"""

from __future__ import annotations

from pathlib import Path

from ...errors import ConfigurationError, DataError
from .base import Format, find_one, refuse_unreadable
from .jsons import AmazonFormat, JSONArrayFormat, JSONLinesFormat, PythonLinesFormat, SteamFormat, YelpFormat
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
from .text import E4SRecFormat, IDGenRecFormat, S3RecFormat


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
    names = ", ".join(format_names()[1:])
    raise DataError(f"{path}: format not recognised; known formats are {names} (choose one with `format`)")
