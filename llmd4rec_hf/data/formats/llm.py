# SPDX-License-Identifier: Apache-2.0
"""What LLM recommenders publish: JSON maps by index, and tables with one row per moment of a history."""

from __future__ import annotations

import logging
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ...errors import DataError, first_line
from ..arrow import from_pandas, is_string
from .base import Format, first_text_line, head, infer_types, read_delimited
from .jsons import is_by_columns, load_json
from .tables import CSVFormat


logger = logging.getLogger(__name__)


class IndexMapFormat(Format):
    """A JSON object with an entry per user or item, known by its first key and how the entry there begins."""

    key: bytes = rb"[^\"]*"
    entry: bytes

    def matches_file(self, path: Path) -> bool:
        start = rb"(\xef\xbb\xbf)?\s*\{\s*\"" + self.key + rb"\"\s*:\s*" + self.entry
        return re.match(start, head(path)) is not None

    def _load(self, path: Path) -> dict[str, Any]:
        content = load_json(path)
        if not isinstance(content, dict) or not content:
            raise DataError(f"{path}: expected a JSON object with an entry per user or item; check the file")
        return content


class LCRecFormat(IndexMapFormat):
    """
    `NAME.inter.json` (`{user: [item, ...]}`, oldest item first) and `NAME.item.json` (`{item: {"title": ...}}`) of
    [LC-Rec](https://huggingface.co/papers/2311.09049), LETTER and MiniOneRec. Alone or in their folder.
    """

    name = "lcrec"
    # Users are numbered in order from 0; attributes of items, the same shape otherwise, come in any order.
    key = rb"0"
    entry = rb"(\[\s*-?\d|\{)"
    log_files = ("*.inter.json",)
    item_files = ("*.item.json",)

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        content = self._load(path)
        if not all(isinstance(items, list) for items in content.values()):
            raise DataError(f"{path}: describes items and holds no interactions; pass it as the items")
        lengths = np.fromiter(map(len, content.values()), np.int64, len(content))
        users = pa.array(list(content)).take(pa.array(np.repeat(np.arange(len(content)), lengths)))
        items = pa.array(list(chain.from_iterable(content.values())))
        return infer_types(pa.table({"user_id": users, "item_id": items}))

    def read_items(self, path: Path) -> pa.Table:
        content = self._load(path)
        if not all(isinstance(item, dict) for item in content.values()):
            raise DataError(f"{path}: holds the items of users and no titles; pass NAME.item.json as the items")
        ids = infer_types(pa.table({"item_id": pa.array(list(content))}))
        fields = from_pandas(pd.DataFrame(list(content.values())))
        return pa.table({"item_id": ids["item_id"]} | {name: _unlisted(fields[name]) for name in fields.column_names})


class AttributesFormat(IndexMapFormat):
    """`NAME_item2attributes.json` of S3-Rec, `{item: [attribute, ...]}`: a catalogue without titles."""

    name = "s3rec_attributes"
    entry = rb"\[\s*\d"

    def matches_file(self, path: Path) -> bool:
        return super().matches_file(path) and not is_by_columns(path)

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        raise DataError(
            f"{path}: entries in no order look like the attributes of items, which are no log; "
            "format='lcrec' reads them as users and their items"
        )

    def read_items(self, path: Path) -> pa.Table:
        content = self._load(path)
        try:
            attributes = pa.array(content.values(), pa.list_(pa.int64())).cast(pa.list_(pa.string()))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"{path}: an item's attributes are no list of numbers ({first_line(error)})") from error
        ids = infer_types(pa.table({"item_id": pa.array(list(content))}))
        return ids.append_column("attributes", pc.binary_join(attributes, "|"))


class SemanticIDFormat(IndexMapFormat):
    """`NAME.index.json` of LC-Rec and its kind, `{item: ["<a_1>", ...]}`: refused, there is nothing to learn."""

    name = "semantic_ids"
    entry = rb"\[\s*\"<"

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        raise DataError(f"{path}: holds semantic ids, neither interactions nor titles; pass the log or the item file")


class P5MapFormat(IndexMapFormat):
    """`datamaps.json` of [P5](https://huggingface.co/papers/2203.13366): refused, it only maps ids to ids."""

    name = "p5_datamaps"
    key = rb"(id2user|user2id|id2item|item2id)"
    entry = rb"\{"

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        raise DataError(f"{path}: maps ids to ids, neither interactions nor titles; pass sequential_data.txt")


class MiniOneRecInfoFormat(Format):
    """`NAME.info.txt` of [MiniOneRec](https://huggingface.co/papers/2510.24431): semantic id, title and item."""

    name = "minionerec"
    names = ("semantic_id", "title", "item_id")

    def matches_file(self, path: Path) -> bool:
        return re.fullmatch(r"(<[a-z]_\d+>)+\t[^\t]*\t\d+", first_text_line(path)) is not None

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        return infer_types(read_delimited(path, "\t", names=list(self.names)))


class HistoryFormat(Format):
    """A CSV file with one row per moment: what came before as a list in brackets, and what came next."""

    needed: tuple[str, ...]

    def matches_file(self, path: Path) -> bool:
        return set(self.needed) <= set(first_text_line(path).split(","))

    def header(self, path: Path) -> list[str]:
        """The columns, among them those that the format cannot do without."""
        names = CSVFormat().column_names(path)
        missing = [name for name in self.needed if name not in names]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r}, without which it is not {self.name}; leave format out")
        return names

    def read_items(self, path: Path) -> pa.Table:
        raise DataError(f"{path}: rows of histories are a log and no catalogue; pass a file with titles")


class BIGRecFormat(HistoryFormat):
    """
    Rows of `user_id`, `history_item_id` and `item_id`, with the same pair for `timestamp` and `rating` where there is
    one, as in [BIGRec](https://huggingface.co/papers/2308.08434) and MiniOneRec.

    A user's log is the history of the first row and then every row's next item.
    """

    name = "bigrec"
    needed = ("user_id", "history_item_id", "item_id")

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        header = self.header(path)
        parts = [name for name in ("item_id", "timestamp", "rating") if {name, f"history_{name}"} <= set(header)]
        wanted = ["user_id", *parts, *(f"history_{name}" for name in parts)]
        table = read_delimited(path, ",", quote='"', header=header, columns=wanted)
        user = pc.index_in(table["user_id"], value_set=pc.unique(table["user_id"])).to_numpy()
        first = np.zeros(len(user), bool)
        first[np.unique(user, return_index=True)[1]] = True
        histories = table.filter(pa.array(first))
        counts, log = None, {}
        for name in parts:
            values, lengths = _lists(histories[f"history_{name}"], path)
            if counts is not None and not np.array_equal(counts, lengths):
                raise DataError(f"{path}: history_{name} differs in length from the items; mend the row")
            counts = lengths
            log[name] = pa.chunked_array([*values.chunks, *table[name].chunks])
        users = histories["user_id"].take(pa.array(np.repeat(np.arange(len(counts)), counts)))
        return infer_types(pa.table({"user_id": pa.chunked_array([*users.chunks, *table["user_id"].chunks]), **log}))


class DLLM2RecFormat(HistoryFormat):
    """
    Rows of `seq` (padded at its end), `len_seq` and `next`, as in
    [DLLM2Rec](https://huggingface.co/papers/2405.00338). They name no user: every row counts as one.
    """

    name = "dllm2rec"
    needed = ("seq", "len_seq", "next")

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        self.header(path)
        logger.warning("%s: its rows name no user, so every row is taken as one user's log", path)
        table = CSVFormat().read(path, list(self.needed))
        values, lengths = _lists(table["seq"], path)
        real = table["len_seq"].to_numpy()
        position = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        history = values.filter(pa.array(position < np.repeat(real, lengths))).cast(pa.int64())
        rows = np.arange(len(table))
        items = pa.chunked_array([*history.chunks, *table["next"].cast(pa.int64()).chunks])
        users = np.concatenate([np.repeat(rows, np.minimum(real, lengths)), rows])
        return pa.table({"user_id": users, "item_id": items})


def _unlisted(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts, of which some are the Python spelling of a list of texts."""
    if not is_string(column.type):
        return column
    column = column.cast(pa.string())
    listed = pc.match_substring_regex(column, r"(?s)^\[['\"].*['\"]\]$")
    inner = pc.replace_substring_regex(column, r"^\[['\"]|['\"]\]$", "")
    plain = pc.replace_substring_regex(inner, r"['\"], ['\"]", " ")
    return pc.if_else(listed, plain, column)


def _lists(column: pa.ChunkedArray, path: Path) -> tuple[pa.ChunkedArray, np.ndarray]:
    """The elements of lists written as `[1, 2, 3]` or `['a', 'b']`, and each list's length."""
    if not pc.all(pc.match_substring_regex(column, r"^\[.*\]$")).as_py():
        raise DataError(f"{path}: expected lists in brackets; check how it was written")
    inner = pc.replace_substring_regex(column, r"[\[\]\s'\"]", "")
    fields = pc.split_pattern(inner, ",").combine_chunks()
    lengths = np.where(np.asarray(pc.equal(inner, "")), 0, fields.value_lengths().to_numpy())
    values = fields.flatten()
    return pa.chunked_array([values.filter(pc.not_equal(values, ""))]), lengths
