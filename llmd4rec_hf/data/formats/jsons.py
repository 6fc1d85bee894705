# SPDX-License-Identifier: Apache-2.0
"""Records, one per line or in one array, as JSON or as Python literals; and the public logs that come so."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.json

from ...errors import DataError, first_line
from ..arrow import from_pandas
from ..columns import KNOWN_NAMES, is_known
from .base import Format, decoded, head, open_binary, text_head, text_lines, text_tail


# Some catalogues have lines of a hundred kilobytes; the fields of the first records are taken from this much.
RECORD_HEAD_BYTES = 1 << 20
SAMPLED_RECORDS = 500
BLOCK_BYTES = 1 << 24

# A string, or one of the words that JSON spells otherwise. Strings are matched whole, so words inside them are safe.
_TOKEN = re.compile(r"""u?'[^'\\]*(?:\\.[^'\\]*)*'|u?"[^"\\]*(?:\\.[^"\\]*)*"|\b(?:True|False|None)\b""", re.DOTALL)
# What JSON spells otherwise; an escaped backslash is among it, lest its second half be taken for an escape.
_OTHER_ESCAPE = re.compile(r"""\\[^nrtu"']""")
_WORDS = {"True": "true", "False": "false", "None": "null"}


class RecordsFormat(Format):
    """Lines of records, whose fields are found in the first and last of them."""

    keys: tuple[frozenset[str], ...] = (frozenset(),)

    def matches_file(self, path: Path) -> bool:
        record = _first_record(path)
        if record is None or (record and all(isinstance(value, (list, dict)) for value in record.values())):
            return False  # a record has single values; this is a whole table, column by column
        return any(keys <= record.keys() for keys in self.keys)

    def column_names(self, path: Path) -> list[str]:
        return list(dict.fromkeys(chain.from_iterable(_sample_records(path))))

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        schema = _schema(_sample_records(path), columns or self.column_names(path))
        return _read_python(path, schema) if is_python(path) else _read_json(path, schema)

    def read_items(self, path: Path) -> pa.Table:
        """Fields that are objects, or of one kind here and another there, say nothing about an item and stay out."""
        fields = _schema(_sample_records(path), self.column_names(path))
        return self.read(path, [name for name, kind in fields.items() if kind is not None and _is_plain(kind)])


class JSONLinesFormat(RecordsFormat):
    """One JSON object per line, optionally gzipped; its types are kept."""

    name = "jsonl"

    def matches_file(self, path: Path) -> bool:
        return super().matches_file(path) and not is_python(path)


class PythonLinesFormat(RecordsFormat):
    """One Python dictionary per line, read as data and never evaluated."""

    name = "python"

    def matches_file(self, path: Path) -> bool:
        return super().matches_file(path) and is_python(path)


class AmazonFormat(RecordsFormat):
    """
    Amazon reviews and metadata of [2014](https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html) (metadata as
    Python literals), [2018](https://nijianmo.github.io/amazon/) and [2023](https://amazon-reviews-2023.github.io)
    (times in milliseconds; `parent_asin` names the product, `asin` one of its variants).
    """

    name = "amazon"
    keys = (frozenset({"asin"}), frozenset({"parent_asin"}))
    hints = {
        "item_id": ("parent_asin", "asin"),
        "user_id": ("reviewerID", "user_id"),
        "timestamp": ("unixReviewTime", "timestamp", "sort_timestamp"),
        "rating": ("overall", "rating"),
    }


class YelpFormat(RecordsFormat):
    """The JSON files of the [Yelp Open Dataset](https://business.yelp.com/data/resources/open-dataset/)."""

    name = "yelp"
    keys = (frozenset({"business_id", "user_id"}), frozenset({"business_id", "name"}))
    hints = {"item_id": ("business_id",), "timestamp": ("date",), "rating": ("stars",)}
    log_files = ("*review.json",)
    item_files = ("*business.json",)


class SteamFormat(RecordsFormat):
    """
    Steam reviews and games as Python literals ([Kang and McAuley, 2018](https://huggingface.co/papers/1808.09781)).

    The user is `username`: only some reviews carry a `user_id`. A few games have no `id` and are left out.
    """

    name = "steam"
    keys = (frozenset({"product_id", "username"}), frozenset({"app_name", "id"}))
    hints = {
        "user_id": ("username",),
        "item_id": ("product_id", "id"),
        "timestamp": ("date",),
        "title": ("app_name", "title"),
    }

    def read_items(self, path: Path) -> pa.Table:
        table = super().read_items(path)
        return table.filter(table["id"].is_valid()) if "id" in table.column_names else table


class JSONArrayFormat(Format):
    """One JSON array of objects."""

    name = "json"

    def matches_file(self, path: Path) -> bool:
        return re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head(path)) is not None

    def read(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        records = load_json(path)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise DataError(f"{path}: no JSON array whose elements are all objects; write one object per row")
        return _as_table(records)


def is_by_columns(path: Path) -> bool:
    """Whether this is one JSON object that holds a table column by column, judged by the first one's name."""
    match = re.match(rb'(\xef\xbb\xbf)?\s*\{\s*"([^"]*)"\s*:\s*[\[{]', head(path))
    return match is not None and any(is_known(match[2].decode(errors="replace"), ours) for ours in KNOWN_NAMES)


def is_python(path: Path) -> bool:
    """Whether the lines are Python literals that are no JSON."""
    line = _first_record_line(path)
    return re.match(r"\{\s*u?'", line) is not None or (line.startswith("{") and not _is_json(line))


def load_json(path: Path) -> Any:
    """The one JSON value in the file."""
    with open_binary(path) as stream:
        content = stream.read()
    try:
        return json.loads(decoded(path, content.decode).removeprefix("\ufeff"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({first_line(error)}); mend it") from error


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _first_record_line(path: Path) -> str:
    return next(iter(text_lines(text_head(path, RECORD_HEAD_BYTES))), "")


def _first_record(path: Path) -> dict[str, Any] | None:
    line = _first_record_line(path)
    return _record(line) if line.lstrip().startswith("{") else None


def _record(line: str) -> dict[str, Any] | None:
    for parse in (json.loads, ast.literal_eval):
        try:
            record = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return record if isinstance(record, dict) and all(isinstance(key, str) for key in record) else None
    return None


def _sample_records(path: Path) -> list[dict[str, Any]]:
    """The first records and, of the last ones, the fields that none of the first has: a field may come late."""
    first = _records(text_lines(text_head(path, RECORD_HEAD_BYTES))[:SAMPLED_RECORDS])
    names = set(chain.from_iterable(first))
    last = _records(text_lines(text_tail(path, RECORD_HEAD_BYTES))[-SAMPLED_RECORDS:])
    return first + [{name: value for name, value in record.items() if name not in names} for record in last]


def _records(lines: list[str]) -> list[dict[str, Any]]:
    return [record for record in map(_record, lines) if record is not None]


def _schema(records: list[dict[str, Any]], columns: list[str]) -> dict[str, pa.DataType | None]:
    """The type of each column in the records; `None` where it is of more than one kind."""
    schema: dict[str, pa.DataType | None] = {}
    for name in columns:
        try:
            kind = pa.array([record.get(name) for record in records]).type
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            kind = None
        except UnicodeEncodeError:  # half of a pair of surrogates, which from_pandas makes good
            kind = pa.string()
        schema[name] = pa.string() if kind is not None and pa.types.is_null(kind) else kind
    return schema


def _is_plain(kind: pa.DataType) -> bool:
    while pa.types.is_list(kind):
        kind = kind.value_type
    return not pa.types.is_nested(kind)


def _read_json(path: Path, schema: dict[str, pa.DataType | None]) -> pa.Table:
    def read(encoding: str) -> pa.Table:
        try:
            with open_binary(path) as stream:
                utf8 = pa.transcoding_input_stream(pa.PythonFile(stream, "r"), encoding, "utf-8")
                return _parse_json(utf8, schema)
        except pa.ArrowInvalid as error:
            try:  # a field that changes its type on the way
                return _loaded_records(path, list(schema), encoding)
            except UnicodeDecodeError:
                raise
            except (ValueError, AttributeError):
                raise DataError(f"{path}: not valid JSON lines ({first_line(error)}); mend that line") from error

    return decoded(path, read)


def _parse_json(stream: Any, schema: dict[str, pa.DataType | None]) -> pa.Table:
    """Only the fields in `schema` are kept; whatever else a record holds is passed over."""
    if None in schema.values():
        raise pa.ArrowInvalid("a field is of more than one type")
    table = pa.json.read_json(
        stream,
        # A large block: an object longer than the block is an error in Arrow.
        read_options=pa.json.ReadOptions(block_size=BLOCK_BYTES << 1),
        parse_options=pa.json.ParseOptions(
            explicit_schema=pa.schema(list(schema.items())), unexpected_field_behavior="ignore"
        ),
    )
    table = table.select(list(schema))
    table.validate(full=True)  # Arrow's reader takes any bytes for UTF-8
    return table


def _loaded_records(path: Path, columns: list[str], encoding: str) -> pa.Table:
    """Slower and larger than Arrow's reader, but fields may change their type from line to line."""
    with open_binary(path) as stream:
        lines = (line.decode(encoding).removeprefix("\ufeff") for line in stream if line.strip())
        records = [json.loads(line) for line in lines]
    return _as_table({name: [record.get(name) for record in records] for name in columns})


def _as_table(records: Any) -> pa.Table:
    """Past pandas' own strings: they refuse half of a pair of surrogates, which `from_pandas` makes good."""
    return from_pandas(pd.DataFrame(records, dtype=object))


def _read_python(path: Path, schema: dict[str, pa.DataType | None]) -> pa.Table:
    def read(encoding: str) -> pa.Table:
        with open_binary(path) as stream:
            tables = [_parse_python(block.decode(encoding), schema, path) for block in _line_blocks(stream)]
        return pa.concat_tables(tables, promote_options="permissive")

    return decoded(path, read)


def _line_blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block + stream.readline()


def _parse_python(block: str, schema: dict[str, pa.DataType | None], path: Path) -> pa.Table:
    """
    Python literals respelled as JSON, token by token: faster than parsing each line, and nothing is run. What JSON
    cannot say is parsed line by line.
    """
    try:
        return _parse_json(pa.BufferReader(_TOKEN.sub(_as_json, block).encode()), schema)
    except (pa.ArrowInvalid, ValueError, SyntaxError, UnicodeEncodeError):
        pass
    lines = text_lines(block)
    records = [_record(line) for line in lines]
    if None in records:
        line = lines[records.index(None)]
        raise DataError(f"{path}: neither JSON nor a Python dictionary: {line[:60]!r}; mend or drop that line")
    return _as_table({name: [record.get(name) for record in records] for name in schema})


def _as_json(match: re.Match[str]) -> str:
    return _spelled(match[0])


@lru_cache(maxsize=1 << 14)  # the same few names and values come in every record
def _spelled(token: str) -> str:
    if token in _WORDS:
        return _WORDS[token]
    text = token.removeprefix("u")[1:-1]
    if not text.isprintable() or _OTHER_ESCAPE.search(text):
        return json.dumps(ast.literal_eval(token))
    # Quotes are what the two languages escape differently; all other escapes left are spelled alike.
    text = text.replace("\\'", "'").replace('\\"', '"').replace('"', '\\"')
    return f'"{text}"'
