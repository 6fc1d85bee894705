# SPDX-License-Identifier: Apache-2.0
"""A teacher that is a black box: whatever can name its best items for a history, with their probabilities."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..data import ItemVocabulary
from ..errors import ConfigurationError, DataError
from .listed_scores import ListedScores
from .stored_teacher import StoredTeacher, position_counts


# By how much the probabilities of a list may add up to more than 1, as half precision makes them.
_SURPLUS = 1e-3
_ROWS_AT_A_TIME = 1024


class ListedTeacherCache(StoredTeacher):
    """
    A black box's top-k items with log-probabilities at every input position of a training set, memory-mapped: for a
    teacher that shows neither hidden states nor an item matrix.

    It takes the place of a [`TeacherCache`] as the trainers' `teacher`. What the lists leave of the probability is
    spread over all other items, see [`ListedScores`]. A position takes `list_size` times 8 bytes on disk, 6 for
    catalogues of up to 65,535 items; log-probabilities are kept in float32.

    Args:
        directory (`str` or `os.PathLike`): a folder that [`~ListedTeacherCache.build`] wrote.

    Attributes:
        manifest (`dict`): format version, name of the teacher, hash of the data, sizes, and the shards' sizes and
            checksums.
        vocabulary ([`ItemVocabulary`] or `None`): what the teacher's ids were translated with.

    Raises:
        CacheError: no cache, one of hidden states, another format version, or a torn or altered file.

    Example:

    ```python
    >>> def teacher(histories):  # [["B1", "B7"], ["B2"], ...]
    ...     answers = [ask(history) for history in histories]
    ...     return [answer.item_ids for answer in answers], [np.log(answer.probabilities) for answer in answers]
    >>> data = splits["train"]
    >>> cache = ListedTeacherCache.build(teacher, data, "lists", name="ranker-v7", vocabulary=vocabulary)
    >>> CRMTrainer(crm, CRMArguments("crm"), data, splits["validation"], teacher=cache).train()
    ```
    """

    holds = "lists"
    format_version = 1
    facts = frozenset({"list_size"})

    def __repr__(self) -> str:
        facts = self.manifest
        return (
            f"ListedTeacherCache({facts['positions']} positions with lists of {facts['list_size']}, "
            f"{facts['num_items']} items)"
        )

    @classmethod
    def build(
        cls,
        teacher: Callable[[list[list]], tuple[Sequence, Sequence]],
        dataset: Dataset,
        directory: str | os.PathLike,
        *,
        name: str,
        vocabulary: ItemVocabulary | None = None,
        num_items: int | None = None,
        list_size: int = 100,
        max_length: int = 50,
        batch_size: int = 128,
    ) -> ListedTeacherCache:
        """
        Ask a teacher about every history of a training set and store its lists. Each process asks for its own rows.

        The teacher is a function from histories, oldest item first, to two sequences with an entry per history: the
        ids of the items it lists, and their log-probabilities over the whole catalogue (with scores $s$:
        `s - logsumexp(s)` over all items, not over the listed ones). Arrays of shape `(B, k)` will do, and so will
        lists of different lengths. Their order does not matter, an empty list says nothing, and items that the
        teacher withholds, as those already bought, are taken for items about which it says nothing.

        Args:
            teacher (`Callable`): the function. Lists that were logged are found by their history, e.g. in a `dict`.
            dataset ([`~datasets.Dataset`]): rows with `item_ids`, `length` and unique non-negative `row_id`.
            directory (`str` or `os.PathLike`): where to write; a cache that is there is replaced, and
                nothing else ever is.
            name (`str`): what tells this teacher from others, with its revision: a black box has no weights to hash.
            vocabulary ([`ItemVocabulary`], *optional*): with it, the teacher is given and gives external ids.
            num_items (`int`, *optional*): number of items N, in place of a vocabulary: ids are then 1..N.
            list_size (`int`, *optional*, defaults to 100): items of a list that are kept, the most probable ones.
            max_length (`int`, *optional*, defaults to 50): longest history in items, and positions per row: at least
                the student's.
            batch_size (`int`, *optional*, defaults to 128): histories per call.

        Returns:
            [`ListedTeacherCache`]

        Raises:
            ConfigurationError: neither or both of vocabulary and `num_items`, sizes below 1.
            DataError: an answer that is not of this form, with an unknown item or one that is listed twice, or with
                log-probabilities that are positive, not a number, or add up to more than 1.
            CacheError: row ids that repeat or are negative.
        """
        facts = _facts(vocabulary, num_items, list_size, max_length)
        if batch_size < 1 or not isinstance(name, str):
            raise ConfigurationError(
                f"batch_size must be at least 1 and name a string, got {batch_size} and {name!r}."
            )

        def begin(folder: Path) -> dict:
            if vocabulary is not None:
                vocabulary.save_pretrained(folder)
            return facts

        def encode(folder: Path, order: np.ndarray):
            return _answers(teacher, dataset, order, vocabulary, batch_size, facts)

        return cls._build(directory, dataset, name, max_length, begin, encode)

    @classmethod
    def for_teacher(
        cls,
        teacher: Callable[[list[list]], tuple[Sequence, Sequence]],
        dataset: Dataset,
        directory: str | os.PathLike,
        *,
        name: str,
        vocabulary: ItemVocabulary | None = None,
        num_items: int | None = None,
        list_size: int = 100,
        max_length: int = 50,
        batch_size: int = 128,
    ) -> ListedTeacherCache:
        """
        The cache in `directory` if it is whole and of this very name, data and sizes, else one built anew.

        Args:
            teacher, dataset, directory, name, vocabulary, num_items, list_size, max_length, batch_size: as in
                [`~ListedTeacherCache.build`].
        """
        found = cls._find(directory, dataset, name, _facts(vocabulary, num_items, list_size, max_length))
        return found or cls.build(
            teacher,
            dataset,
            directory,
            name=name,
            vocabulary=vocabulary,
            num_items=num_items,
            list_size=list_size,
            max_length=max_length,
            batch_size=batch_size,
        )

    @staticmethod
    def _row_type(facts: dict) -> np.dtype:
        ids = np.min_scalar_type(facts["num_items"]).newbyteorder("<")
        shape = (facts["list_size"],)
        return np.dtype([("log_probs", "<f4", shape), ("ids", ids, shape)])

    @staticmethod
    def _hash_of(teacher: str) -> str:
        return teacher

    def _unpack(self, rows: np.ndarray, device: torch.device | str) -> ListedScores:
        ids, log_probs = rows["ids"].astype(np.int64), rows["log_probs"].copy()
        return ListedScores(torch.from_numpy(ids).to(device), torch.from_numpy(log_probs).to(device))


def _facts(vocabulary: ItemVocabulary | None, num_items: int | None, list_size: int, max_length: int) -> dict:
    """What a cache's manifest says of its sizes."""
    if (vocabulary is None) == (num_items is None):
        raise ConfigurationError("Give either a vocabulary or num_items: they say which ids the teacher knows.")
    num_items = num_items if vocabulary is None else len(vocabulary)
    facts = {"num_items": num_items, "list_size": min(list_size, num_items), "max_length": max_length}
    for name, value in facts.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}.")
    return facts


def _answers(
    teacher, dataset, order, vocabulary, batch_size: int, facts: dict
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of row ids `(P,)`, positions in the row `(P,)` and records `(P,)`, for the rows in `order`."""
    total = int(position_counts(dataset, facts["max_length"])[order].sum())
    histories = _histories(dataset, order, vocabulary, facts["max_length"])
    with tqdm(total=total, desc="Asking the teacher", leave=False) as progress:
        while batch := list(itertools.islice(histories, batch_size)):
            row_ids, positions, asked = zip(*batch, strict=True)
            ids, log_probs = _padded(teacher(list(asked)), len(batch), vocabulary, facts["num_items"])
            _check(ids, log_probs, [f"row {row}, after {len(items)} items" for row, _, items in batch])
            yield np.array(row_ids), np.array(positions), _records(ids, log_probs, facts)
            progress.update(len(batch))


def _histories(dataset, order, vocabulary, max_length: int) -> Iterator[tuple[int, int, list]]:
    """Row ids, positions among those that are stored of a row, and the histories up to there, in the teacher's ids."""
    columns = dataset.select_columns(["item_ids", "row_id"])
    for begin in range(0, len(order), _ROWS_AT_A_TIME):
        for row in columns.__getitems__(order[begin : begin + _ROWS_AT_A_TIME].tolist()):
            items = np.asarray(row["item_ids"])[:-1]
            items = items.tolist() if vocabulary is None else vocabulary.decode(items)
            first = max(0, len(items) - max_length)
            for position in range(len(items) - first):
                end = first + position + 1
                yield int(row["row_id"]), position, items[max(0, end - max_length) : end]


def _padded(answer, count: int, vocabulary: ItemVocabulary | None, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """A teacher's answer as arrays of shape `(B, k)`: ids, 0 where a list is shorter, and log-probabilities."""
    wanted = "A teacher must return ids and log-probabilities, for each history a list of each, equally long"
    try:
        ids, log_probs = answer
        ids = [np.asarray(entry) for entry in ids]
        log_probs = [np.asarray(entry, np.float64) for entry in log_probs]
        lengths, others = [len(entry) for entry in ids], [len(entry) for entry in log_probs]
    except (TypeError, ValueError) as error:
        raise DataError(f"{wanted}: {error}") from error
    if len(lengths) != count or lengths != others:
        raise DataError(f"{wanted}: for {count} histories it returned lists of the lengths {lengths} and {others}.")
    listed = np.arange(max(lengths)) < np.array(lengths)[:, None]
    padded_ids, padded_log_probs = np.zeros(listed.shape, np.int64), np.full(listed.shape, -np.inf)
    if listed.any():
        # Without the empty ones, which numpy takes for floating-point numbers.
        padded_ids[listed] = _internal(np.concatenate([entry for entry in ids if len(entry)]), vocabulary, num_items)
        padded_log_probs[listed] = np.concatenate(log_probs)
    return padded_ids, padded_log_probs


def _internal(ids: np.ndarray, vocabulary: ItemVocabulary | None, num_items: int) -> np.ndarray:
    if vocabulary is not None:
        return vocabulary.encode(ids)
    if ids.dtype.kind not in "iu" or ids.min() < 1 or ids.max() > num_items:
        raise DataError(
            f"Without a vocabulary a teacher lists items 1..{num_items}, got {ids.dtype} in {ids.min()}..{ids.max()}."
        )
    return ids


def _check(ids: np.ndarray, log_probs: np.ndarray, names: list[str]) -> None:
    ordered = np.sort(ids, axis=1)
    # What is above 0 has been named before its sum matters; cut off, it does not overflow.
    sums = np.exp(np.minimum(log_probs, 1)).sum(axis=1, keepdims=True)
    faults = {
        "a log-probability that is not a number": np.isnan(log_probs),
        "a log-probability above 0 (is it a probability, or a score without its normaliser?)": log_probs > _SURPLUS,
        "probabilities that add up to more than 1": sums > 1 + _SURPLUS,
        "an item twice": (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0),
    }
    for fault, found in faults.items():
        if found.any():
            raise DataError(f"The teacher's list for {names[found.any(axis=1).argmax()]}, holds {fault}.")


def _records(ids: np.ndarray, log_probs: np.ndarray, facts: dict) -> np.ndarray:
    """The most probable items of each list, best first, as they lie on disk."""
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, : facts["list_size"]]
    records = np.zeros(len(ids), ListedTeacherCache._row_type(facts))
    for name, values in (("ids", ids), ("log_probs", log_probs)):
        records[name][:, : best.shape[1]] = np.take_along_axis(values, best, axis=1)
    return records
