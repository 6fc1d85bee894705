# SPDX-License-Identifier: Apache-2.0
"""Catalogues: an id, a title and the words that describe an item."""

from __future__ import annotations

import html
import logging
import string
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigurationError, DataError
from .arrow import decoded, first_true, is_string, to_dataset
from .columns import KNOWN_NAMES, ids, resolve_columns
from .sources import open_source


logger = logging.getLogger(__name__)

# In the metadata of a table whose texts are made already and come back as they are.
FINAL_TEXT = b"llmd4rec_hf.final_text"
# Only names that HTML knows: `<Deluxe Edition>` in a title is no tag.
_TAGS = (
    "a|abbr|article|aside|b|big|blockquote|body|br|center|cite|code|col|colgroup|dd|del|div|dl|dt|em|embed|figure|font|"
    "footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|map|meta|nav|noscript|object|ol|"
    "option|p|param|pre|q|s|section|select|small|source|span|strike|strong|sub|sup|table|tbody|td|textarea|tfoot|th|"
    "thead|title|tr|tt|u|ul|video"
)
_MARKUP = [
    r"(?is)<script\b.*?(</script>|$)",
    r"(?is)<style\b.*?(</style>|$)",
    r"(?s)<!--.*?-->",
    rf"(?i)</?({_TAGS})(\s[^<>]*)?/?>",
]


def load_items(
    source: str | Path | pd.DataFrame | datasets.Dataset,
    *,
    format: str = "auto",
    columns: dict[str, str | int] | None = None,
    text_template: str | None = None,
    max_text_length: int = 512,
    duplicates: str = "refuse",
    revision: str | None = None,
    token: str | bool | None = None,
) -> datasets.Dataset | None:
    """
    Loads the catalogue.

    Args:
        source (`str`, `Path`, `pandas.DataFrame` or `datasets.Dataset`):
            A file with one item per row, a folder that holds `items.*`, a table, or the id of a dataset on the Hub.
        format (`str`, *optional*, defaults to `"auto"`):
            The name of the file's format; `"auto"` finds it by the content.
        columns (`dict[str, str or int]`, *optional*):
            Our names `item_id` and `title` mapped to those of the source, or to their numbers from 0 as in
            [`load_interactions`]; common names are guessed.
        text_template (`str`, *optional*):
            How an item is put into words, such as `"{title} ({brand}; {category})"`; the title alone by default. A
            field is a column, or `brand`, `category` or `description` by any of their common names. Where an item has
            nothing for a field, brackets and separators left bare around it go too.
        max_text_length (`int`, *optional*, defaults to 512):
            Longer texts are cut to this many characters.
        duplicates (`str`, *optional*, defaults to `"refuse"`):
            What becomes of an item with several rows and different titles: `"refuse"`, or `"first"` to keep the first
            row. Rows with the same id and title are always taken as one.
        revision (`str`, *optional*):
            The branch, tag or commit of a Hub dataset.
        token (`str` or `bool`, *optional*):
            The token for a private Hub dataset.

    Returns:
        `datasets.Dataset` or `None`: `item_id`, `title`, `text` and the source's other columns. `text` is free of HTML
        and runs of whitespace and never empty: an item without a title is described by its other text columns, or else
        by its id. `None` for a folder without a catalogue.

    Raises:
        `DataError`: The source is missing or not understood, an item occurs twice, or the template names no column.
    """
    if duplicates not in ("refuse", "first"):
        raise ConfigurationError(f"duplicates={duplicates!r}; choose 'refuse' or 'first'")
    if max_text_length < 1:
        raise ConfigurationError(f"max_text_length={max_text_length}; a text needs at least one character")
    opened = open_source(source, "items", format=format, columns=columns, revision=revision, token=token)
    if opened is None:
        return None
    where, table = opened.where, opened.read(None)
    names = _item_columns(table.column_names, columns, where, opened.hints)
    item_ids = ids(table[names["item_id"]], f"{where}, column {names['item_id']!r}")
    taken = {"item_id", "title", names["item_id"], names.get("title")}
    others = [name for name in table.column_names if name not in taken]
    title = table[names["title"]] if "title" in names else pa.chunked_array([pa.nulls(len(item_ids), pa.string())])
    catalogue = pa.table({"item_id": item_ids, "title": clean_text(title)} | {name: table[name] for name in others})
    catalogue = _one_row_per_item(catalogue, duplicates, where)
    if text_template is None and FINAL_TEXT in (table.schema.metadata or {}):
        return to_dataset(catalogue.replace_schema_metadata(None))
    text = _item_text(catalogue, text_template or "{title}", max_text_length, where, opened.hints)
    kept = catalogue.select([name for name in catalogue.column_names if name != "text"])
    return to_dataset(kept.append_column("text", text))


def _item_columns(
    found: list[str], columns: dict[str, str | int] | None, where: str, hints: dict[str, tuple[str, ...]]
) -> dict[str, str]:
    """`item_id` and, if there is one, `title`, mapped to the columns of a catalogue."""
    hints = {**hints, "item_id": (*hints.get("item_id", ()), *KNOWN_NAMES["item_id"], "id")}
    names = resolve_columns(found, columns, where, ("item_id", "title"), required=1, hints=hints)
    unknown = sorted(names.keys() - {"item_id", "title"})
    if unknown:
        raise ConfigurationError(
            f"columns names {unknown[0]!r}; of a catalogue only item_id and title can be named: the others keep their "
            "names, by which text_template finds them"
        )
    if "title" not in names and resolve_columns(found, None, where, ("user_id",), required=0):
        raise DataError(f"{where}: has users and no titles, so it is a log and no catalogue; pass a file with titles")
    return names


def clean_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text without HTML, line breaks and runs of whitespace; empty where there is none. Lists are joined by commas."""
    column = pc.fill_null(_as_text(column), "")
    escaped = pc.match_substring(column, "&")
    if pc.any(escaped).as_py():
        # Arrow has no kernel for HTML entities: only the few texts that hold one take this detour.
        plain = [html.unescape(text) for text in column.filter(escaped).to_pylist()]
        column = pc.replace_with_mask(column.combine_chunks(), escaped.combine_chunks(), pa.array(plain, pa.string()))
    if pc.any(pc.match_substring(column, "<")).as_py():
        for pattern in _MARKUP:
            column = pc.replace_substring_regex(column, pattern, " ")
    column = pc.utf8_trim_whitespace(pc.replace_substring_regex(column, r"[\s\p{Z}]+", " "))
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = decoded(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lists = column.combine_chunks()
        lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
        # A list of lists is a list of paths, as in the categories of 2014.
        inner = pa.types.is_list(lists.type.value_type)
        values = _as_text(pa.chunked_array([lists.flatten()])).combine_chunks()
        # Without what is missing inside a list: joined with it, nothing of the list would be left.
        there = values.is_valid()
        lengths = np.bincount(pc.list_parent_indices(lists).filter(there), minlength=len(lists))
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        texts = pa.ListArray.from_arrays(offsets, values.filter(there).cast(pa.string()))
        joined = pc.binary_join(texts, "; " if inner else ", ")
        return pa.chunked_array([pc.if_else(lists.is_null(), None, joined)])
    if pa.types.is_struct(column.type):
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    return column.cast(pa.string())


def _one_row_per_item(catalogue: pa.Table, duplicates: str, where: str) -> pa.Table:
    keys = catalogue.select(["item_id", "title"]).to_pandas()
    same = keys.duplicated().to_numpy()
    doubled = keys["item_id"].duplicated().to_numpy()
    row = first_true(doubled & ~same)
    if row is not None and duplicates == "refuse":
        item = catalogue["item_id"][row].as_py()
        raise DataError(
            f"{where}: item {item!r} occurs more than once with different titles; keep one row of it: "
            "prepare.py --duplicate_items first, prepare(duplicate_items='first') or load_items(duplicates='first')"
        )
    if not doubled.any():
        return catalogue
    logger.warning("%s: %d further rows of items that had one before are left out", where, doubled.sum())
    return catalogue.filter(pa.array(~doubled))


def _item_text(
    catalogue: pa.Table, template: str, max_length: int, where: str, hints: dict[str, tuple[str, ...]]
) -> pa.ChunkedArray:
    text = _fill_template(catalogue, template, where, hints)
    others = [catalogue[name] for name in catalogue.column_names if name not in ("item_id", "title", "text")]
    others = [column for column in others if is_string(column.type) and not _are_decimals(column)]
    fallbacks = (_join(others), catalogue["item_id"].cast(pa.string()))
    for fallback, source in zip(fallbacks, ("their other columns", "their id"), strict=True):
        empty = pc.equal(text, "")
        filled = pc.sum(pc.and_(empty, pc.not_equal(fallback, ""))).as_py()
        if filled:
            logger.warning("%s: %d items without a title are described by %s", where, filled, source)
        text = pc.if_else(empty, fallback, text)
    return pc.utf8_slice_codeunits(text, 0, max_length)


def _are_decimals(column: pa.ChunkedArray) -> bool:
    """Whether a column, prices say, is text only so that no digit of it is lost."""
    return bool(pc.all(pc.match_substring_regex(column, r"^-?[0-9]+\.[0-9]+$")).as_py())


def _fill_template(
    catalogue: pa.Table, template: str, where: str, hints: dict[str, tuple[str, ...]]
) -> pa.ChunkedArray:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigurationError(f"text_template {template!r}: {error}") from error
    parts: list[Any] = []
    has_gap = pa.scalar(False)
    for literal, field, _, _ in pieces:
        parts.append(literal)
        if field is not None:
            parts.append(clean_text(_field(catalogue, field, where, hints)))
            has_gap = pc.or_(has_gap, pc.equal(parts[-1], ""))
    if len(parts) == len(pieces):
        raise ConfigurationError(f"text_template {template!r} names no field, so all items would be called the same")
    text = clean_text(pa.chunked_array([pc.binary_join_element_wise(*parts, "").combine_chunks()]))
    return text if template == "{title}" else pc.if_else(has_gap, _without_gaps(text), text)


def _field(catalogue: pa.Table, field: str, where: str, hints: dict[str, tuple[str, ...]]) -> pa.ChunkedArray:
    if field in catalogue.column_names:
        return catalogue[field]
    try:
        name = resolve_columns(catalogue.column_names, None, where, (field,), required=1, hints=hints)[field]
    except (DataError, KeyError):
        found = ", ".join(catalogue.column_names)
        raise DataError(f"{where}: text_template names {field!r}; the columns are {found}") from None
    return catalogue[name]


def _without_gaps(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Takes out what stood around a field that was empty: bare brackets and separators."""
    for pattern, replacement in (
        (r"([(\[{])[\s,;:|/-]+", r"\1"),
        (r"[\s,;:|/-]+([)\]}])", r"\1"),
        (r"\s*(\(\)|\[\]|\{\})", ""),
        (r"^[\s,;:|/-]+|[\s,;:|/-]+$", ""),
    ):
        text = pc.replace_substring_regex(text, pattern, replacement)
    return text


def _join(columns: list[pa.ChunkedArray]) -> Any:
    if not columns:
        return pa.scalar("")
    joined = pc.binary_join_element_wise(*(clean_text(column) for column in columns), ", ")
    return pc.utf8_trim(pc.replace_substring_regex(joined, "(, )+", ", "), " ,")  # empty columns leave bare commas
