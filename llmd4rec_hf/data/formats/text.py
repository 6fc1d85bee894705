# SPDX-License-Identifier: Apache-2.0
"""Lines of ids between blanks: sequences, pairs, and ids with the words that describe them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError
from ..columns import is_known
from .base import Format, head_lines, infer_types, read_lines, read_names, refuse_unreadable
from .llm import AttributesFormat


# Seconds since 1973, or finer; or a date.
_TIME = r"([1-9]\d{8,}(\.\d+)?|\d{4}-\d\d-\d\d\S*)"


def misread_table(path: Path) -> str | None:
    """
    Why the lines between blanks in `path` are those of a table, of which neither names nor times may become items, and
    what to do; `None` where they may be users and their items.
    """
    rows = [line.split() for line in head_lines(path)]
    if rows and any(set(word) & set(',{}[]"') for word in rows[0]):
        return None  # JSON, say
    if not any(re.search(r"\d", word) for row in rows for word in row) and any(row[-1][-1] in ".!?:" for row in rows):
        return "this looks like sentences, of which no word is an id (format='s3rec' reads them as a user and items)"
    if rows and all(any(is_known(word, ours) for word in rows[0]) for ours in ("user_id", "item_id")):
        return "this is a table with a header and blanks between its columns: separate them by tabs or commas"
    counts = {len(row) for row in rows}
    if len(counts) == 1 and counts <= {3, 4} and all(re.fullmatch(_TIME, row[-1]) for row in rows):
        lines = rf"^\S+(\s+\S+){{{counts.pop() - 2}}}\s+{_TIME}$"
        if pc.all(pc.match_substring_regex(read_lines(path), lines)).as_py():
            return (
                "every line looks like a user, an item and a time; write them with tabs or commas and a header "
                "(format='s3rec' reads them as a user and items)"
            )
    return None


class S3RecFormat(Format):
    """
    Lines of `user item item ...`, oldest item first, as in [S3-Rec](https://huggingface.co/papers/2008.07873), P5 and
    OpenP5.

    A user may come on several lines, so the `user item` pairs of SASRec.pytorch are read too. A folder may hold
    S3-Rec's `NAME.txt` and `NAME_item2attributes.json`.
    """

    name = "s3rec"

    def matches(self, path: Path) -> bool:
        return path.is_dir() and self._attributes(path) is not None or path.is_file() and self.matches_file(path)

    def matches_file(self, path: Path) -> bool:
        lines = head_lines(path)
        plain = all(not set(line) & set(',\t{}[]"') and len(line.split()) >= 2 for line in lines)
        return bool(lines) and plain and misread_table(path) is None

    def locate(self, path: Path, part: str) -> tuple[Format, Path] | None:
        if path.is_file():
            return self, path
        attributes = self._attributes(path)
        if attributes is None:
            raise DataError(f"{path}: no NAME.txt with its NAME_item2attributes.json; name the log itself")
        if part == "items":
            return AttributesFormat(), attributes
        return self, attributes.with_name(attributes.name.replace("_item2attributes.json", ".txt"))

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        fields = pc.utf8_split_whitespace(read_lines(path)).combine_chunks()
        counts = fields.value_lengths().to_numpy()
        if (counts < 2).any():
            line = int((counts < 2).argmax())
            raise DataError(f"{path}: line {line + 1} holds a user and no item; drop the line or add its items")
        tokens = fields.flatten()
        starts = np.cumsum(counts) - counts
        is_user = np.zeros(len(tokens), bool)
        is_user[starts] = True
        users = tokens.take(pa.array(np.repeat(starts, counts - 1)))
        log = pa.table({"user_id": users, "item_id": tokens.filter(pa.array(~is_user))})
        return infer_types(log)

    def read_items(self, path: Path) -> pa.Table:
        raise DataError(f"{path}: lines of a user and items are a log and no catalogue; pass a file with titles")

    @staticmethod
    def _attributes(folder: Path) -> Path | None:
        files = sorted(folder.glob("*_item2attributes.json"))
        files = [file for file in files if file.with_name(file.name.replace("_item2attributes.json", ".txt")).exists()]
        return files[0] if len(files) == 1 else None


class E4SRecFormat(S3RecFormat):
    """
    Folders of [E4SRec](https://huggingface.co/papers/2312.02443): `general/NAME` with `train.txt`, `valid.txt` and
    `test.txt`, whose lines are joined user by user in this order, or `sequential/NAME` with `NAME.txt`.
    """

    name = "e4srec"
    parts = ("train.txt", "valid.txt", "test.txt")

    def matches(self, path: Path) -> bool:
        files = self._files(path)
        return bool(files) and all(self.matches_file(file) for file in files)

    def locate(self, path: Path, part: str) -> tuple[Format, Path] | None:
        if part == "items" and path.is_dir():
            return None
        if path.is_dir() and not self._files(path):
            raise DataError(f"{path}: holds neither train.txt and test.txt nor {path.name}.txt; name the log itself")
        return self, path

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        files = [path] if path.is_file() else self._files(path)
        for file in files:
            refuse_unreadable(file)
        tables = [super(E4SRecFormat, self).read(file) for file in files]
        if len({table.schema for table in tables}) > 1:  # ids that are numbers in one file and words in another
            tables = [table.cast(pa.schema({"user_id": pa.string(), "item_id": pa.string()})) for table in tables]
        return pa.concat_tables(tables)

    def _files(self, path: Path) -> list[Path]:
        files = [path / name for name in self.parts if (path / name).is_file()]
        if len(files) >= 2:
            return files
        own = path.resolve() / f"{path.resolve().name}.txt"
        return [own] if own.is_file() else []


class IDGenRecFormat(Format):
    """
    Lines of an Amazon id and the words that stand for the item in
    [IDGenRec](https://huggingface.co/papers/2403.19021): a catalogue.
    """

    name = "idgenrec"

    def matches_file(self, path: Path) -> bool:
        fields = [line.split() for line in head_lines(path)]
        words = [word for _, *rest in fields for word in rest]
        # A log of the same shape has an item's id where this has a word.
        plain = sum(bool(re.fullmatch(r"[a-z]{2,}", word)) for word in words)
        return (
            bool(words)
            and all(re.fullmatch(r"[0-9A-Z]{10}", first) for first, *_ in fields)
            and (2 * plain > len(words))
        )

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        raise DataError(f"{path}: lines of an item and its words are a catalogue and no log; pass it as the items")

    def read_items(self, path: Path) -> pa.Table:
        return read_names(path, " ")
