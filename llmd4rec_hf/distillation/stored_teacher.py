# SPDX-License-Identifier: Apache-2.0
"""A teacher on disk: one record per position of a training set, whatever the teacher has to say there."""

from __future__ import annotations

import json
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers.utils import logging

from ..data import ItemVocabulary, data_hash
from ..data.arrow import column_array
from ..data.vocabulary import VOCABULARY_FILE
from ..errors import CacheError
from ..files import MANIFEST_NAME, file_facts, is_altered, write_json
from ..processes import on_every_process, on_main_process


logger = logging.get_logger(__name__)

OFFSETS_NAME = "offsets.npy"
# Row ids beyond it, and beyond a thousand times the number of rows, are refused: they are hashes, or ids of users, and
# the offsets have a place for every id.
_LARGEST_ROW_ID = 10**6
# All that a folder may hold which a new cache takes the place of.
_CACHE_FILES = re.compile(r"(manifest|vocabulary)\.json|offsets\.npy|item_matrix\.safetensors|\w+-\d+-of-\d+\.npy")
_FACTS = {"holds", "num_items", "max_length", "positions", "data_hash", "teacher_hash", "shards", "files"}


class StoredTeacher(ABC):
    """
    What caches of a teacher have in common: the folder, its manifest with checksums, and where a position's record
    lies in memory-mapped shards.

    Positions are addressed from the end of a row, so a student that reads shorter histories than its teacher did finds
    the right ones. A subclass names what it holds, the class attributes below, says what a record is (`_row_type`,
    `_unpack`), and has a `build`, which calls `_build`.

    Args:
        directory (`str` or `os.PathLike`): a folder that `build` wrote.

    Attributes:
        manifest (`dict`): format version, hashes of teacher and data, shapes, and the shards' sizes and checksums.
        item_matrix (`torch.Tensor` of shape `(N + 1, r)`, *optional*): the teacher's item vectors, if it has any.
        vocabulary ([`ItemVocabulary`] or `None`): the teacher's, if it had one.

    Raises:
        CacheError: no cache, one of another kind or format version, or a torn or altered file.
    """

    # What a shard holds, of which version of the format, and what its manifest says beside what all of them say.
    holds: str
    format_version: int
    facts: frozenset[str]

    item_matrix: torch.Tensor | None = None

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.manifest = self._read_manifest()
        for name, facts in self.manifest["files"].items():
            if is_altered(self.directory / name, facts):
                raise CacheError(
                    f"{self.directory / name} is missing, torn or altered: build the teacher cache again with "
                    f"{type(self).__name__}.build."
                )
        self.vocabulary = None
        if VOCABULARY_FILE in self.manifest["files"]:
            self.vocabulary = ItemVocabulary.from_pretrained(self.directory)
        self._offsets = np.load(self.directory / OFFSETS_NAME, allow_pickle=False)
        self._shards = [
            np.load(self.directory / name, mmap_mode="r", allow_pickle=False) for name in self.manifest["shards"]
        ]
        self._shard_starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    # --- reading -------------------------------------------------------------------------------------------------

    def check(self, *, num_items: int | None = None, dataset: Dataset | None = None, teacher=None) -> None:
        """
        Raise unless this cache was made over `num_items` items, from this data set, by this teacher.

        Args:
            num_items (`int`, *optional*): number of items N.
            dataset ([`~datasets.Dataset`], *optional*): the training set.
            teacher (*optional*): what `build` was given to name the teacher: a model, or a black box's name.

        Raises:
            CacheError: names what differs.
        """
        found = {
            "num_items": num_items,
            "data_hash": None if dataset is None else data_hash(dataset),
            "teacher_hash": None if teacher is None else self._hash_of(teacher),
        }
        for key, value in found.items():
            if value is not None and value != self.manifest[key]:
                raise CacheError(
                    f"The teacher cache {self.directory} does not fit: its {key} is {self.manifest[key]!r}, and here "
                    f"it is {value!r}. Build it again with {type(self).__name__}.build."
                )

    def lookup(self, row_id: torch.LongTensor, labels: torch.LongTensor, attention_mask: torch.LongTensor) -> Any:
        """
        What the teacher says at the supervised positions of a batch, in row-major order.

        Args:
            row_id (`torch.LongTensor` of shape `(B,)`): the rows' ids.
            labels (`torch.LongTensor` of shape `(B, T)`): -100 where there is nothing to learn.
            attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 at items; padding is on the right.

        Returns:
            For the P positions with a label, on the labels' device: of a [`TeacherCache`] the hidden states, a
            `torch.FloatTensor` of shape `(P, r)`; of a [`ListedTeacherCache`] the lists, [`ListedScores`].

        Raises:
            CacheError: a row or a position that the teacher has not seen.
        """
        # In one piece, because each copy from a GPU waits for all that it still has to do.
        facts = torch.cat([row_id[:, None], attention_mask.sum(dim=1, keepdim=True), labels], dim=1).cpu().numpy()
        ids, lengths = facts[:, 0], facts[:, 1]
        rows, columns = (facts[:, 2:] != -100).nonzero()
        self._check_rows(ids)
        from_end = (lengths[rows] - columns).astype(np.int64)
        starts, ends = self._offsets[ids[rows]], self._offsets[ids[rows] + 1]
        index = ends - from_end
        if (index < starts).any():
            row = ids[rows][np.argmax(index < starts)]
            raise CacheError(
                f"The student reads more of row {row} than its teacher did: build the teacher cache with a max_length "
                "of at least the student's, or give the student the teacher's max_length."
            )
        return self._unpack(self._gather(index), labels.device)

    @abstractmethod
    def _unpack(self, rows: np.ndarray, device: torch.device | str) -> Any:
        """What `lookup` gives for records."""

    def _check_rows(self, ids: np.ndarray) -> None:
        held = (ids >= 0) & (ids < len(self._offsets) - 1)
        # Ids between those of the data set own no position.
        held[held] = self._offsets[ids[held] + 1] > self._offsets[ids[held]]
        if not held.all():
            raise CacheError(
                f"Row {ids[~held][0]} is not in the teacher cache {self.directory}: it was built for another data set."
            )

    def _gather(self, index: np.ndarray) -> np.ndarray:
        if len(self._shards) == 1:
            return self._shards[0][index]
        gathered = np.empty(len(index), dtype=self._shards[0].dtype)
        owners = np.searchsorted(self._shard_starts, index, side="right") - 1
        for number in np.unique(owners):
            mine = owners == number
            gathered[mine] = self._shards[number][index[mine] - self._shard_starts[number]]
        return gathered

    def _read_manifest(self) -> dict:
        path = self.directory / MANIFEST_NAME
        remedy = f"build it with {type(self).__name__}.build"
        if not path.is_file():
            raise CacheError(f"There is no teacher cache in {self.directory}: {remedy}.")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            version, holds = manifest["format_version"], manifest.get("holds", self.holds)
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{path} is damaged ({error}): {remedy} again.") from error
        if holds != self.holds:
            raise CacheError(f"The teacher cache {self.directory} holds {holds!r}, not {self.holds!r}: {remedy} anew.")
        if version != self.format_version:
            raise CacheError(
                f"{path} has format version {version}, this package reads {self.format_version}: {remedy} again."
            )
        missing = sorted((_FACTS | self.facts) - set(manifest))
        if missing:
            raise CacheError(f"{path} is damaged (no {missing[0]}): {remedy} again.")
        return manifest

    # --- building ------------------------------------------------------------------------------------------------

    @classmethod
    def _build(
        cls,
        directory: str | os.PathLike,
        dataset: Dataset,
        teacher,
        max_length: int,
        begin: Callable[[Path], dict],
        encode: Callable[[Path, np.ndarray], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]],
    ):
        """
        Write a cache beside its place and move it there, in one step. Each process writes the shard of its own rows.

        Args:
            directory, dataset, teacher, max_length: as `build` was given them.
            begin (`Callable`): writes what there is beside the shards into a folder, on the main process alone, and
                returns the facts of the manifest that only it knows.
            encode (`Callable`): from that folder and the indices of rows, longest first, to batches of row ids `(P,)`,
                positions in the row `(P,)` and records `(P,)`.
        """
        # In full: `.` has no name that another could be beside, and `..` is not the folder that it stands in.
        directory = Path(directory).resolve()
        partial = directory.with_name(directory.name + ".partial")

        def prepare():
            _refuse_other_files(directory)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return begin(partial)

        def finish():
            names = sorted(path.name for path in partial.iterdir())
            sizes = [len(np.load(partial / name, mmap_mode="r", allow_pickle=False)) for name in shards]
            manifest = {
                "format_version": cls.format_version,
                "holds": cls.holds,
                **facts,
                "max_length": max_length,
                "positions": sum(sizes),
                "data_hash": data_hash(dataset),
                "teacher_hash": cls._hash_of(teacher),
                "shards": shards,
                "files": {name: file_facts(partial / name) for name in names},
            }
            write_json(partial / MANIFEST_NAME, manifest)
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)

        facts = on_main_process(prepare)
        shards = on_every_process(
            lambda: _write_shards(dataset, partial, max_length, cls.holds, cls._row_type(facts), encode)
        )
        on_main_process(finish)
        return on_every_process(lambda: cls(directory))

    @classmethod
    def _find(cls, directory: str | os.PathLike, dataset: Dataset, teacher, asked: dict):
        """The cache in `directory` if it is whole, of this very teacher and data, and as it is asked for."""

        def open_fitting():
            cache = cls(directory)
            cache.check(dataset=dataset, teacher=teacher)
            for name, value in asked.items():
                if cache.manifest[name] != value:
                    raise CacheError(f"The teacher cache {directory} is for another {name}.")
            return cache

        try:
            # One process that cannot read it is enough to build it again, and all must agree: building is collective.
            return on_every_process(open_fitting)
        except CacheError as error:
            if Path(directory).exists():
                logger.warning(f"{error} It is built again now.")
        return None

    @staticmethod
    @abstractmethod
    def _row_type(facts: dict) -> np.dtype:
        """What one position takes on disk."""

    @staticmethod
    @abstractmethod
    def _hash_of(teacher) -> str:
        """What tells a teacher from others."""


def _refuse_other_files(directory: Path) -> None:
    """Raise where what a cache would take the place of is no cache, whole or damaged."""
    if directory.exists() and not directory.is_dir():
        raise CacheError(f"{directory} is a file: give the teacher cache a folder.")
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    others = [name for name in names if not _CACHE_FILES.fullmatch(name)]
    if others:
        raise CacheError(
            f"{directory} holds {others[0]!r}, which is no part of a teacher cache, and would be lost: give a "
            "folder of its own."
        )


def position_counts(dataset: Dataset, max_length: int) -> np.ndarray:
    """Input positions of each row, of which the newest `max_length` stay."""
    return np.minimum(column_array(dataset, "length").astype(np.int64) - 1, max_length)


def _write_shards(
    dataset: Dataset, directory: Path, max_length: int, holds: str, dtype: np.dtype, encode: Callable
) -> list[str]:
    """Write this process's shard and the offsets; returns the names of all shards."""
    state = PartialState()
    row_ids = column_array(dataset, "row_id").astype(np.int64)
    counts = position_counts(dataset, max_length)
    if len(np.unique(row_ids)) < len(row_ids) or row_ids.min(initial=0) < 0:
        raise CacheError("A teacher cache needs unique, non-negative row ids: `row_id` repeats or is negative.")
    if row_ids.max(initial=0) > _LARGEST_ROW_ID + 1000 * len(row_ids):
        raise CacheError(
            f"The largest row id of {len(row_ids)} rows is {row_ids.max()}, and a cache takes 8 bytes for each up "
            "to it: number the rows from 0 (`dataset.map(lambda row, index: {'row_id': index}, with_indices=True)`)."
        )
    # One entry per id up to the largest: ids that are not in this split own no position.
    per_id = np.zeros(row_ids.max(initial=-1) + 1, dtype=np.int64)
    per_id[row_ids] = counts
    offsets = np.concatenate([[0], np.cumsum(per_id)])
    bounds = np.linspace(0, len(per_id), state.num_processes + 1).astype(np.int64)
    names = [f"{holds}-{rank:05d}-of-{state.num_processes:05d}.npy" for rank in range(state.num_processes)]
    if state.is_main_process:
        np.save(directory / OFFSETS_NAME, offsets)
    first, last = bounds[state.process_index], bounds[state.process_index + 1]
    mine = np.flatnonzero((row_ids >= first) & (row_ids < last))
    shard = _reserve(directory / names[state.process_index], (int(offsets[last] - offsets[first]),), dtype)
    _fill_shard(shard, offsets - offsets[first], encode(directory, mine[np.argsort(-counts[mine], kind="stable")]))
    shard.flush()
    return names


def _reserve(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory-mapped array with its room on the disk: without that a full disk would end the process by a signal."""
    shard = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return shard


def _fill_shard(shard: np.ndarray, starts: np.ndarray, encoded: Iterator) -> None:
    """Put every position's record at its place, of which there are as many as the rows' lengths have reserved."""
    reserved, found = np.diff(starts), np.zeros(len(starts) - 1, dtype=np.int64)
    for row_ids, positions, records in encoded:
        np.add.at(found, row_ids, 1)
        _refuse_rows(row_ids[found[row_ids] > reserved[row_ids]], "more")
        shard[starts[row_ids] + positions] = records
    # The others are of other processes.
    rows = np.flatnonzero(found)
    _refuse_rows(rows[found[rows] < reserved[rows]], "fewer")


def _refuse_rows(rows: np.ndarray, how_many: str) -> None:
    if len(rows):
        raise CacheError(
            f"Row {rows[0]} has {how_many} items than its `length` says: make that the number of its item_ids."
        )
