# SPDX-License-Identifier: Apache-2.0
"""MovieLens in its three generations, and the lists of names that borrow its `::`."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from .base import (
    UNIT_SEPARATOR,
    Format,
    first_text_line,
    head_lines,
    infer_types,
    open_binary,
    read_delimited,
    read_names,
)
from .tables import CSVFormat


GENRES = [
    *["unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"],
    *["Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"],
]
RATING_NAMES = ["user_id", "item_id", "rating", "timestamp"]
MOVIE_NAMES = ["item_id", "title", "category"]
U_ITEM_NAMES = ["item_id", "title", "release_date", "video_release_date", "imdb_url", *GENRES]
LAYOUTS = {
    "u.data": r"\d+\t\d+\t\d(\.\d)?\t\d+",
    "u.item": r"[^|]+\|[^|]+\|([^|]*\|){3}([01]\|){18}[01]",
    "ratings.dat": r"\d+::\d+::\d(\.\d)?::\d+",
    "movies.dat": r"\d+::((?!::).)+::((?!::).)*",
    "csv": r"userId,movieId,rating,timestamp|movieId,title,genres",
}


class MovieLensFormat(Format):
    """
    Ratings and movies of [MovieLens](https://grouplens.org/datasets/movielens/): 100K (`u.data`, `u.item`), 1M and 10M
    (`ratings.dat`, `movies.dat`) and everything later (`ratings.csv`, `movies.csv`), alone or in their folder.
    """

    name = "movielens"
    hints = {"category": ("genres",)}
    log_files = ("u.data", "ratings.dat", "ratings.csv")
    item_files = ("u.item", "movies.dat", "movies.csv")

    def matches_file(self, path: Path) -> bool:
        return self._layout(path) is not None

    def column_names(self, path: Path) -> list[str] | None:
        return CSVFormat().column_names(path) if self._layout(path) == "csv" else None

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        layout = self._layout(path) or "csv"
        if layout == "csv":
            return CSVFormat().read(path, columns)
        if layout == "u.item":
            return _read_u_item(path)
        if layout == "u.data":
            return infer_types(read_delimited(path, "\t", names=RATING_NAMES))
        return _read_colons(path, RATING_NAMES if layout == "ratings.dat" else MOVIE_NAMES)

    @staticmethod
    def _layout(path: Path) -> str | None:
        # The second line decides on u.item: in some copies a first line pretends to name the columns.
        lines = head_lines(path, 2)
        for name, pattern in LAYOUTS.items():
            if lines and re.fullmatch(pattern, lines[-1 if name == "u.item" else 0]):
                return name
        return None


class LLaRAFormat(Format):
    """Lines of `id::name`, the item names of [LLaRA](https://huggingface.co/papers/2312.02445): a catalogue."""

    name = "llara"

    def matches_file(self, path: Path) -> bool:
        lines = head_lines(path)
        return bool(lines) and all(re.fullmatch(r"[^:\s]+::\S.*", line) and line.count("::") == 1 for line in lines)

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        return infer_types(read_names(path, "::"))


def _read_u_item(path: Path) -> pa.Table:
    table = read_delimited(path, "|", names=U_ITEM_NAMES)
    if not re.match(r"\d+\|", first_text_line(path)):  # the line that pretends to name the columns
        table = table.slice(1)
    flags = [pc.if_else(pc.equal(table[genre], "1"), genre, None) for genre in GENRES]
    category = pc.binary_join_element_wise(*flags, "|", null_handling="skip")
    return infer_types(table.drop_columns(GENRES).append_column("category", category))


def _read_colons(path: Path, names: list[str]) -> pa.Table:
    """Arrow knows delimiters of one character only, so `::` becomes one that no text holds."""
    with open_binary(path) as stream:
        content = stream.read().replace(b"::", UNIT_SEPARATOR.encode())
    return infer_types(read_delimited(path, UNIT_SEPARATOR, names=names, content=content))
