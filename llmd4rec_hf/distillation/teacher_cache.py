# SPDX-License-Identifier: Apache-2.0
"""A frozen teacher's knowledge on disk, small and close to exact.

A teacher's scores are `hidden @ item_matrix.T`, so its hidden state per position and its item matrix once say all
there is to say about its output distribution: for Beauty (12,101 items) and a CRM of width 64 that is a hundredth of
the scores in half precision, and nothing is rounded or cut off. A wide teacher, an LLM, is rounded to 16 bits and,
if an error is allowed for, narrowed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import ItemVocabulary, SequenceCollator, data_hash
from ..data.arrow import column_array
from ..errors import CacheError, ConfigurationError
from ..files import MANIFEST_NAME, file_facts, is_altered, write_json
from ..processes import on_every_process, on_main_process
from .low_rank import LowRankTeacher, reduce_teacher, score_errors
from .stored_rows import EXACT_WIDTH, pack, row_type, unpack


logger = logging.get_logger(__name__)

FORMAT_VERSION = 2
OFFSETS_NAME = "offsets.npy"
ITEM_MATRIX_NAME = "item_matrix.safetensors"
VOCABULARY_NAME = "vocabulary.json"
_FACTS = {
    *("num_items", "hidden_size", "max_length", "positions", "data_hash", "teacher_hash", "shards", "files"),
    *("max_error", "reduction"),
}
# Random positions per dimension of a teacher from which its narrow form is found. Sixteen leave its error elsewhere
# some hundredths above the one that was asked for.
_FITTED_POSITIONS_PER_DIMENSION = 16
_CHECKED_POSITIONS = 1024


class TeacherCache:
    """
    A teacher's hidden state at every input position of a training set, memory-mapped, and its item matrix.

    Positions are addressed from the end of a row, so a student that reads shorter histories than its teacher did finds
    the right ones.

    A teacher of up to 128 dimensions is stored as it is. A wider one is rounded to 16 bits a number, with a scale of
    its own for each position: scores are off by about 1e-4 nats (root mean square), and a KL through the cache, as the
    mean of a batch, by less than 1e-5. With `max_error` it is also narrowed: see [`~TeacherCache.build`].

    Args:
        directory (`str` or `os.PathLike`): a folder that [`~TeacherCache.build`] wrote.

    Attributes:
        manifest (`dict`): format version, hashes of teacher and data, shapes, and the shards' sizes and checksums.
            `reduction` is `None`, or what narrowing did: `teacher_width`, and over a sample of `positions` the root
            mean square `score_error` and the mean `kl` of the teacher to what is stored, in nats.
        item_matrix (`torch.Tensor` of shape `(N + 1, r)`): float32; the teacher's own, unless it has been narrowed.
        vocabulary ([`ItemVocabulary`] or `None`): the teacher's, if it had one.

    Raises:
        CacheError: no cache, another format version, or a torn or altered file.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        for name, facts in self.manifest["files"].items():
            _check_file(self.directory / name, facts)
        self.item_matrix: torch.Tensor = load_file(self.directory / ITEM_MATRIX_NAME)["item_matrix"]
        self.vocabulary = None
        if VOCABULARY_NAME in self.manifest["files"]:
            self.vocabulary = ItemVocabulary.from_pretrained(self.directory)
        self._offsets = np.load(self.directory / OFFSETS_NAME, allow_pickle=False)
        self._shards = [
            np.load(self.directory / name, mmap_mode="r", allow_pickle=False) for name in self.manifest["shards"]
        ]
        self._shard_starts = np.cumsum([0] + [len(shard) for shard in self._shards])

    def __repr__(self) -> str:
        facts = self.manifest
        return (
            f"TeacherCache({facts['positions']} positions of width {facts['hidden_size']}, {facts['num_items']} items)"
        )

    @property
    def is_reduced(self) -> bool:
        """Whether it holds a narrower form of the teacher; `item_matrix` is then not the teacher's own."""
        return self.manifest["reduction"] is not None

    @classmethod
    def build(
        cls,
        teacher,
        dataset: Dataset,
        directory: str | os.PathLike,
        *,
        max_length: int | None = None,
        batch_size: int = 128,
        max_error: float = 0.0,
    ) -> TeacherCache:
        """
        Run a teacher over a training set and store what it knows. Each process writes the shard of its own rows.

        With `max_error`, a teacher of more than 128 dimensions is replaced by its best low-rank form within that
        error ([`reduce_teacher`]), so that a narrow student's step does not pay for the teacher's width. The form is
        found from a random sample of 16 positions per dimension; the error is then measured on a sample again, and
        recorded. An error of `e` nats moves the distribution by a KL of about `e**2 / 2`. A teacher that needs more
        than half its width is stored as it is.

        Args:
            teacher ([`RecommenderModel`]): in evaluation mode while it runs; its weights are not touched.
            dataset ([`~datasets.Dataset`]): rows with `item_ids`, `length` and unique non-negative `row_id`.
            directory (`str` or `os.PathLike`): where to write; a cache that is there is replaced.
            max_length (`int`, *optional*): longest history in items; the teacher's own by default.
            batch_size (`int`, *optional*, defaults to 128): rows per forward pass.
            max_error (`float`, *optional*, defaults to 0.0): how far the scores of a wide teacher may be off, root
                mean square in nats.

        Returns:
            [`TeacherCache`]

        Raises:
            CacheError: hidden states that are not finite, row ids that repeat or are negative.
            ConfigurationError: a negative `max_error`, a `max_length` that the teacher cannot read.
        """
        if not max_error >= 0:
            raise ConfigurationError(f"max_error must not be negative, got {max_error}.")
        directory = Path(directory)
        partial = directory.with_name(directory.name + ".partial")
        collator = SequenceCollator(max_length=max_length or teacher.config.max_length)

        def begin():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            return _write_items(teacher, dataset, partial, collator, batch_size, max_error)

        def end():
            asked = {"max_length": collator.max_length, "max_error": max_error}
            _write_manifest(teacher, dataset, partial, shards, {**asked, "reduction": reduction})
            shutil.rmtree(directory, ignore_errors=True)
            os.replace(partial, directory)

        reduction = on_main_process(begin)
        shards = on_every_process(lambda: _write_shards(teacher, dataset, partial, collator, batch_size))
        on_main_process(end)
        return on_every_process(lambda: cls(directory))

    @classmethod
    def for_teacher(cls, teacher, dataset: Dataset, directory: str | os.PathLike, **build_arguments) -> TeacherCache:
        """The cache in `directory` if it is whole and of this very teacher and data, else one built anew."""
        asked = {
            "max_length": build_arguments.get("max_length") or teacher.config.max_length,
            "max_error": build_arguments.get("max_error", 0.0),
        }

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
        return cls.build(teacher, dataset, directory, **build_arguments)

    def check(self, *, num_items: int | None = None, dataset: Dataset | None = None, teacher=None) -> None:
        """
        Raise unless this cache was made over `num_items` items, from this data set, by this teacher.

        Raises:
            CacheError: names what differs.
        """
        found = {
            "num_items": num_items,
            "data_hash": None if dataset is None else data_hash(dataset),
            "teacher_hash": None if teacher is None else teacher.content_hash(),
        }
        for key, value in found.items():
            if value is not None and value != self.manifest[key]:
                raise CacheError(
                    f"The teacher cache {self.directory} does not fit: its {key} is {self.manifest[key]!r}, and here "
                    f"it is {value!r}. Build it again with TeacherCache.build."
                )

    def lookup(
        self, row_id: torch.LongTensor, labels: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.Tensor:
        """
        The teacher's hidden states at the supervised positions of a batch, in row-major order.

        Args:
            row_id (`torch.LongTensor` of shape `(B,)`): the rows' ids.
            labels (`torch.LongTensor` of shape `(B, T)`): -100 where there is nothing to learn.
            attention_mask (`torch.LongTensor` of shape `(B, T)`): 1 at items; padding is on the right.

        Returns:
            `torch.Tensor` of shape `(P, r)`, float32, for the P positions with a label, on the labels' device.

        Raises:
            CacheError: a row or a position that the teacher has not seen.
        """
        rows, columns = (labels != -100).nonzero().T.cpu().numpy()
        lengths = attention_mask.sum(dim=1).cpu().numpy()
        ids = row_id.cpu().numpy()
        self._check_rows(ids)
        from_end = (lengths[rows] - columns).astype(np.int64)
        starts, ends = self._offsets[ids[rows]], self._offsets[ids[rows] + 1]
        index = ends - from_end
        if (index < starts).any():
            row = ids[rows][np.argmax(index < starts)]
            raise CacheError(
                f"The student reads more of row {row} than its teacher did: build the teacher cache with a max_length "
                "of at least the student's."
            )
        return unpack(self._gather(index), labels.device)

    def item_vectors(self, width: int) -> torch.Tensor:
        """
        The teacher's item vectors in a student's width, for the student to begin with.

        They are the items' side of the best form of its scores in so few dimensions ([`reduce_teacher`]). Of each
        axis's share in the scores they take the root, so that minor axes are not lost, and all of the scores' spread:
        a student's hidden states of unit size then give scores that spread as the teacher's do. Where the student is
        the wider one, its further dimensions are zero.

        Args:
            width (`int`): the student's number of dimensions.

        Returns:
            `torch.Tensor` of shape `(N + 1, width)`; row 0, padding, is zero.
        """
        positions = self.manifest["positions"]
        count = min(positions, _FITTED_POSITIONS_PER_DIMENSION * self.item_matrix.shape[1])
        hidden = unpack(self._gather(np.linspace(0, positions - 1, count, dtype=np.int64))).double()
        form = reduce_teacher(hidden.T @ hidden / len(hidden), self.item_matrix, max_rank=width)
        spread = form.sizes.square().sum() / form.sizes.sum()
        vectors = form.item_matrix * (form.sizes * spread).sqrt()
        return torch.nn.functional.pad(vectors, (0, width - vectors.shape[1]))

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


@torch.no_grad()
def _write_items(teacher, dataset, directory: Path, collator, batch_size: int, max_error: float) -> dict | None:
    """Write the item matrix: the teacher's own, or the narrow one with its projection, of which it returns facts."""
    item_matrix = teacher.item_matrix().float()
    _check_finite(item_matrix[1:], "item matrix")
    tensors, facts = {"item_matrix": item_matrix}, None
    if max_error > 0 and item_matrix.shape[1] > EXACT_WIDTH and len(dataset):
        # Where double precision is to be had.
        item_matrix = item_matrix.cpu() if item_matrix.device.type == "mps" else item_matrix
        form, facts = _narrow_form(teacher, item_matrix, dataset, collator, batch_size, max_error)
        if form is not None:
            tensors = {"item_matrix": form.item_matrix, "projection": form.projection}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / ITEM_MATRIX_NAME)
    return facts


def _narrow_form(
    teacher, item_matrix, dataset, collator, batch_size: int, max_error: float
) -> tuple[LowRankTeacher | None, dict | None]:
    """The low-rank form and what it changes, measured on a sample; nothing if it is not half as wide."""
    width, counts = item_matrix.shape[1], _position_counts(dataset, collator)
    order = np.random.default_rng(0).permutation(len(counts))
    # From the other end: in all but small data sets the error is measured on rows that had no part in the form.
    fitted = _first_rows(order, counts, _FITTED_POSITIONS_PER_DIMENSION * width)
    checked = _first_rows(order[::-1], counts, _CHECKED_POSITIONS)
    moment, positions = 0.0, 0
    for _, _, hidden in _encoded(teacher, dataset, fitted, collator, batch_size):
        hidden = hidden.to(item_matrix).double()
        moment, positions = moment + hidden.T @ hidden, positions + len(hidden)
    form = reduce_teacher(moment / positions, item_matrix, max_error)
    if form.projection.shape[1] > width // 2:
        return None, None
    sample = _encoded(teacher, dataset, checked, collator, batch_size)
    hidden = torch.cat([part.to(item_matrix) for _, _, part in sample])
    stored = unpack(pack(hidden @ form.projection), hidden.device)
    error, kl = score_errors(hidden, item_matrix, stored, form.item_matrix)
    return form, {"teacher_width": width, "score_error": error, "kl": kl, "positions": len(hidden)}


def _first_rows(order: np.ndarray, counts: np.ndarray, positions: int) -> np.ndarray:
    """As many rows of `order` as hold that many positions, longest first; all if they hold fewer."""
    rows = order[: np.searchsorted(np.cumsum(counts[order]), positions) + 1]
    return rows[np.argsort(-counts[rows])]


def _position_counts(dataset, collator) -> np.ndarray:
    return np.minimum(column_array(dataset, "length").astype(np.int64) - 1, collator.max_length)


def _write_shards(teacher, dataset, directory: Path, collator, batch_size: int) -> list[str]:
    """Write this process's shard and the offsets; returns the names of all shards."""
    state = PartialState()
    row_ids = column_array(dataset, "row_id").astype(np.int64)
    counts = _position_counts(dataset, collator)
    if len(np.unique(row_ids)) < len(row_ids) or row_ids.min(initial=0) < 0:
        raise CacheError("A teacher cache needs unique, non-negative row ids: `row_id` repeats or is negative.")
    # One entry per id up to the largest: ids that are not in this split own no position.
    per_id = np.zeros(row_ids.max(initial=-1) + 1, dtype=np.int64)
    per_id[row_ids] = counts
    offsets = np.concatenate([[0], np.cumsum(per_id)])
    bounds = np.linspace(0, len(per_id), state.num_processes + 1).astype(np.int64)
    names = [f"hidden-{rank:05d}-of-{state.num_processes:05d}.npy" for rank in range(state.num_processes)]
    if state.is_main_process:
        np.save(directory / OFFSETS_NAME, offsets)
    first, last = bounds[state.process_index], bounds[state.process_index + 1]
    mine = np.flatnonzero((row_ids >= first) & (row_ids < last))
    width, projection = _stored_width(directory)
    size = int(offsets[last] - offsets[first])
    shard = _reserve(directory / names[state.process_index], (size,), row_type(width))
    encoded = _encoded(teacher, dataset, mine[np.argsort(-counts[mine])], collator, batch_size)
    _fill_shard(shard, offsets - offsets[first], encoded, projection)
    shard.flush()
    return names


def _stored_width(directory: Path) -> tuple[int, torch.Tensor | None]:
    """The width of what is stored, and what takes the teacher's hidden states to it, if anything has to."""
    with safe_open(directory / ITEM_MATRIX_NAME, "pt") as file:
        projection = file.get_tensor("projection") if "projection" in file.keys() else None  # noqa: SIM118
        return file.get_slice("item_matrix").get_shape()[1], projection


def _reserve(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A memory-mapped array with its room on the disk: without that a full disk would end the process by a signal."""
    shard = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return shard


def _fill_shard(shard, starts, encoded, projection: torch.Tensor | None) -> None:
    """Put every encoded position at its place."""
    for row_ids, positions, hidden in encoded:
        if projection is not None:
            projection = projection.to(hidden.device)
            hidden = hidden.float() @ projection
        shard[starts[row_ids] + positions] = pack(hidden)


@torch.no_grad()
def _encoded(
    teacher, dataset, order, collator, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """Batches of row ids `(P,)`, positions in the row `(P,)` and hidden states `(P, d_t)`, for the rows in `order`."""
    was_training = teacher.training
    teacher.eval()
    columns = dataset.select_columns(["item_ids", "row_id"])
    for begin in tqdm(range(0, len(order), batch_size), desc="Caching the teacher", leave=False):
        batch = collator(columns.__getitems__(order[begin : begin + batch_size].tolist()))
        device = teacher.device
        hidden = teacher.encode(batch["item_ids"].to(device), batch["attention_mask"].to(device))
        mask = batch["attention_mask"].bool()
        rows, positions = mask.nonzero().T.numpy()
        hidden = hidden[mask.to(device)]
        _check_finite(hidden, "hidden state")
        yield batch["row_id"].numpy()[rows], positions, hidden
    teacher.train(was_training)


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise CacheError(f"The teacher's {what} holds numbers that are not finite: did it diverge in training?")


def _write_manifest(teacher, dataset, directory: Path, shards: list[str], facts: dict) -> None:
    items, width = load_file(directory / ITEM_MATRIX_NAME)["item_matrix"].shape
    names = [*shards, OFFSETS_NAME, ITEM_MATRIX_NAME]
    if getattr(teacher, "vocabulary", None) is not None:
        teacher.vocabulary.save_pretrained(directory)
        names.append(VOCABULARY_NAME)
    sizes = [len(np.load(directory / name, mmap_mode="r", allow_pickle=False)) for name in shards]
    manifest = {
        "format_version": FORMAT_VERSION,
        "num_items": items - 1,
        "hidden_size": width,
        "positions": sum(sizes),
        **facts,
        "data_hash": data_hash(dataset),
        "teacher_hash": teacher.content_hash(),
        "shards": shards,
        "files": {name: file_facts(directory / name) for name in names},
    }
    write_json(directory / MANIFEST_NAME, manifest)


def _read_manifest(directory: Path) -> dict:
    path = directory / MANIFEST_NAME
    remedy = "build it with TeacherCache.build"
    if not path.is_file():
        raise CacheError(f"There is no teacher cache in {directory}: {remedy}.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged ({error}): {remedy} again.") from error
    if version != FORMAT_VERSION:
        raise CacheError(f"{path} has format version {version}, this package reads {FORMAT_VERSION}: {remedy} again.")
    missing = sorted(_FACTS - set(manifest))
    if missing:
        raise CacheError(f"{path} is damaged (no {missing[0]}): {remedy} again.")
    return manifest


def _check_file(path: Path, facts: dict) -> None:
    if is_altered(path, facts):
        raise CacheError(f"{path} is missing, torn or altered: build the teacher cache again with TeacherCache.build.")
