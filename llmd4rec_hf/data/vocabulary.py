# SPDX-License-Identifier: Apache-2.0
"""The map between external item ids and the internal ids 1..N that models compute with."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import hf_hub_download

from ..errors import DataError, UnknownItemsError, first_line
from ..files import whole_file
from .arrow import first_true, id_array, same_type, to_table


logger = logging.getLogger(__name__)

VOCABULARY_FILE = "vocabulary.json"
FORMAT_VERSION = 1


class ItemVocabulary:
    """
    External item ids, their internal ids 1..N (0 is padding), and what each item is called.

    It is saved beside every model, because internal ids mean nothing without it. Passed to a `Trainer` as
    `processing_class`, it is written into every checkpoint. A vocabulary never changes; [`~ItemVocabulary.add`]
    returns a new one.

    Args:
        item_ids (`Sequence[int]` or `Sequence[str]`):
            The external ids in internal order; the first one gets internal id 1. Mixed types become strings.
        texts (`Sequence[str]`, *optional*):
            One text per item.

    Raises:
        `DataError`: No item, a missing or doubled id, or not one text per item.

    Example:
        ```python
        >>> vocabulary = ItemVocabulary(["B1", "B2"], ["red boots", "blue boots"])
        >>> vocabulary.encode(["B2", "B1"])
        array([2, 1])
        >>> vocabulary.decode([2])
        ['B2']
        ```
    """

    def __init__(self, item_ids: Sequence[int] | Sequence[str], texts: Sequence[str] | None = None) -> None:
        if len(item_ids) == 0:
            raise DataError("a vocabulary needs at least one item; check the log it is built from")
        ids, mixed = id_array(item_ids, "vocabulary")
        if mixed:
            logger.warning("item ids mix numbers and strings: all of them are turned to strings")
        self._ids: pa.Array = ids.combine_chunks()
        self._texts = None if texts is None else _text_array(texts, len(self._ids))
        counts = pc.value_counts(self._ids)
        row = first_true(pc.greater(counts.field("counts"), 1))
        if row is not None:
            item = counts.field("values")[row].as_py()
            raise DataError(f"item id {item!r} occurs more than once; ids must be unique")

    @classmethod
    def from_interactions(
        cls, interactions: datasets.Dataset, items: datasets.Dataset | None = None
    ) -> ItemVocabulary:
        """
        The items of a log, in the order of their ids: numbers by value, strings alphabetically.

        Args:
            interactions (`datasets.Dataset`):
                What [`load_interactions`] returns. Only items that occur in it enter; see [`~ItemVocabulary.add`].
            items (`datasets.Dataset`, *optional*):
                What [`load_items`] returns: gives each item its text. Items it lacks are called by their id.
        """
        ids = pc.unique(to_table(interactions)["item_id"])
        ids = ids.take(pc.sort_indices(ids))
        return cls(ids, None if items is None else _texts_for(ids, items))

    @property
    def num_items(self) -> int:
        """N; internal ids run from 1 to N."""
        return len(self._ids)

    @cached_property
    def item_ids(self) -> list[int] | list[str]:
        """The external ids; the one at index `i` has internal id `i + 1`."""
        return self._ids.to_pylist()

    @cached_property
    def texts(self) -> list[str] | None:
        """The items' texts in the same order, or `None`."""
        return None if self._texts is None else self._texts.to_pylist()

    @cached_property
    def content_hash(self) -> str:
        """sha256 of ids and texts."""
        return hashlib.sha256(json.dumps([self.item_ids, self.texts]).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num_items

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ItemVocabulary) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        return f"ItemVocabulary(num_items={self.num_items}, content_hash={self.content_hash[:12]!r})"

    def text(self, internal_id: int) -> str:
        """The text of one item by its internal id; its external id where there are no texts."""
        if not 1 <= internal_id <= self.num_items:
            raise DataError(f"internal id {internal_id} is outside 1..{self.num_items}")
        return str((self._ids if self._texts is None else self._texts)[internal_id - 1].as_py())

    def encode(self, item_ids: Any, *, unknown: str = "raise") -> np.ndarray:
        """
        Internal ids of external ones.

        Args:
            item_ids (`Sequence`, `numpy.ndarray`, `pyarrow.Array` or `pyarrow.ChunkedArray`):
                External ids; `12` and `"12"` name the same item.
            unknown (`str`, *optional*, defaults to `"raise"`):
                `"ignore"` leaves unknown ids out, so that the result may be shorter; `"zero"` has 0, which is padding,
                in their places.

        Returns:
            `numpy.ndarray`: `int64` of shape (number of ids,), values in 1..N.

        Raises:
            `UnknownItemsError`: An id is unknown; the message names it.
        """
        if unknown not in ("raise", "ignore", "zero"):
            raise DataError(f"unknown={unknown!r}; choose 'raise', 'ignore' or 'zero'")
        if len(item_ids) == 0:
            return np.empty(0, np.int64)
        theirs, ours = same_type(id_array(item_ids, "encode")[0], self._ids)
        index = pc.fill_null(pc.index_in(theirs, value_set=ours), -1).to_numpy().astype(np.int64) + 1
        missing = index == 0
        if unknown == "zero" or not missing.any():
            return index
        if unknown == "ignore":
            return index[~missing]
        name = theirs[first_true(missing)].as_py()
        raise UnknownItemsError(
            f"{int(missing.sum())} of {len(index)} item ids are not in the vocabulary, first {name!r}",
            "leave them out, or make a vocabulary that holds them, with ItemVocabulary.from_interactions or .add",
        )

    def decode(self, internal_ids: Any) -> Any:
        """
        External ids of internal ones.

        Args:
            internal_ids (`Sequence`, `numpy.ndarray` or CPU `torch.Tensor` of any shape):
                Values in 1..N.

        Returns:
            `list`: The external ids, nested as the input is.
        """
        index = np.asarray(internal_ids)
        if index.size == 0:
            return index.tolist()
        if index.dtype.kind not in "iu":
            raise DataError(f"internal ids must be integers, got {index.dtype}")
        if index.min() < 1 or index.max() > self.num_items:
            wrong = int(index.min() if index.min() < 1 else index.max())
            raise DataError(f"internal id {wrong} is outside 1..{self.num_items} (0 is padding); mask it first")
        flat = self._ids.take(pa.array(index.reshape(-1) - 1)).to_pylist()
        return flat if index.ndim == 1 else np.array(flat, object).reshape(index.shape).tolist()

    def first_difference(self, other: ItemVocabulary) -> str | None:
        """Where two vocabularies part, in one line for a person, or `None` if they are equal."""
        if self == other:
            return None
        for kind, here, there in (("id", self.item_ids, other.item_ids), ("text", self.texts, other.texts)):
            if here is None or there is None:
                if here is not there:
                    return f"{'the first' if here is None else 'the second'} has no texts"
                continue
            for i, (a, b) in enumerate(zip(here, there, strict=False), start=1):
                if a != b:
                    return f"item {i}: {kind} {a!r} against {b!r}"
            if len(here) != len(there):
                return f"{len(here)} items against {len(there)}"
        return None

    def add(self, item_ids: Sequence[int] | Sequence[str], texts: Sequence[str] | None = None) -> ItemVocabulary:
        """
        A new vocabulary with further (cold) items at the end; the internal ids of the old ones stay.

        Args:
            item_ids (`Sequence[int]` or `Sequence[str]`):
                External ids that are not yet in the vocabulary.
            texts (`Sequence[str]`, *optional*):
                Their texts; needed if, and only if, the vocabulary has texts.
        """
        if (texts is None) != (self._texts is None):
            raise DataError("give texts for the new items exactly when the vocabulary has texts")
        return ItemVocabulary(
            [*self.item_ids, *item_ids], None if texts is None else [*self._texts.to_pylist(), *texts]
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """
        Writes `vocabulary.json`, whole or not at all.

        Args:
            save_directory (`str` or `Path`):
                Made if it does not exist.
            kwargs:
                Accepted and left alone, because `Trainer` treats a vocabulary like any other processing class.

        Returns:
            `list[str]`: The path written.
        """
        path = Path(save_directory, VOCABULARY_FILE)
        content = {"format_version": FORMAT_VERSION, "item_ids": self.item_ids, "texts": self.texts}
        with whole_file(path) as partial:
            partial.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return [str(path)]

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, subfolder: str = "", **hub_options: Any) -> ItemVocabulary:
        """
        Reads the vocabulary saved beside a model.

        Args:
            name_or_path (`str` or `Path`):
                A folder, or the id of a model on the Hub.
            subfolder (`str`, *optional*, defaults to `""`):
                The folder inside it.
            hub_options:
                Passed to [`~huggingface_hub.hf_hub_download`]: `revision`, `token`, `cache_dir`, ...
        """
        path = Path(name_or_path, subfolder, VOCABULARY_FILE)
        if not Path(name_or_path).is_dir():
            try:
                path = Path(hf_hub_download(str(name_or_path), VOCABULARY_FILE, subfolder=subfolder, **hub_options))
            except Exception as error:
                raise DataError(
                    f"{name_or_path}: no such folder, and no {VOCABULARY_FILE} on the Hub ({first_line(error)}); "
                    "check the name"
                ) from error
        return cls(*_read_file(path))


def _read_file(path: Path) -> tuple[list, list | None]:
    if not path.is_file():
        raise DataError(f"{path}: not found; a model is only usable with the vocabulary it was trained on")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, item_ids, texts = content["format_version"], content["item_ids"], content["texts"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error}); save the vocabulary again") from error
    if version != FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}; update the package")
    return item_ids, texts


def _text_array(texts: Any, num_items: int) -> pa.Array:
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else pa.array(texts, pa.string())
    if len(array) != num_items:
        raise DataError(f"{len(array)} texts for {num_items} items; give one text per item")
    if array.null_count:
        raise DataError(f"item {first_true(array.is_null()) + 1} has no text; give every item one, or no item any")
    return array


def _texts_for(ids: pa.Array, items: datasets.Dataset) -> pa.ChunkedArray:
    table = to_table(items)
    column = next((name for name in ("text", "title") if name in table.column_names), None)
    if column is None or "item_id" not in table.column_names:
        found = ", ".join(table.column_names)
        raise DataError(f"the catalogue has the columns {found}; it needs item_id and title: use load_items()")
    wanted, known = same_type(pa.chunked_array([ids]), table["item_id"])
    rows = pc.index_in(wanted, value_set=known.combine_chunks())
    if rows.null_count == len(ids) and len(known):
        raise DataError(
            f"none of {len(ids)} items has a text in the catalogue, whose first item is {known[0].as_py()!r} where "
            f"the log's is {wanted[0].as_py()!r}: it is of other items, or its ids are written otherwise"
        )
    texts = table[column].cast(pa.string()).take(rows)
    missing = pc.or_(pc.is_null(texts), pc.fill_null(pc.equal(texts, ""), True))
    count = pc.sum(missing).as_py()
    if count:
        logger.warning("%d of %d items have no text in the catalogue: their id is used", count, len(ids))
    return pc.if_else(missing, wanted.cast(pa.string()), texts)
