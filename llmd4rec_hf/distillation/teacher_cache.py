# SPDX-License-Identifier: Apache-2.0
"""A frozen teacher's knowledge on disk, small and close to exact.

A teacher's scores are `hidden @ item_matrix.T`, so its hidden state per position and its item matrix once say all
there is to say about its output distribution: for Beauty (12,101 items) and a CRM of width 64 that is a hundredth of
the scores in half precision, and nothing is rounded or cut off. A wide teacher, an LLM, is rounded to 16 bits and,
if an error is allowed for, narrowed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..data import SequenceCollator
from ..errors import CacheError, ConfigurationError
from ..modes import evaluating
from .low_rank import LowRankTeacher, reduce_teacher, score_errors
from .stored_rows import EXACT_WIDTH, pack, row_type, unpack
from .stored_teacher import StoredTeacher, position_counts


ITEM_MATRIX_NAME = "item_matrix.safetensors"
# Random positions per dimension of a teacher from which its narrow form is found. Sixteen leave its error elsewhere
# some hundredths above the one that was asked for.
_FITTED_POSITIONS_PER_DIMENSION = 16
_CHECKED_POSITIONS = 1024


class TeacherCache(StoredTeacher):
    """
    A teacher's hidden state at every input position of a training set, memory-mapped, and its item matrix. A student
    may read shorter histories than its teacher did.

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

    holds = "hidden"
    format_version = 2
    facts = frozenset({"hidden_size", "max_error", "reduction"})

    def __init__(self, directory: str | os.PathLike):
        super().__init__(directory)
        self.item_matrix: torch.Tensor = load_file(self.directory / ITEM_MATRIX_NAME)["item_matrix"]

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
            directory (`str` or `os.PathLike`): where to write; a cache that is there is replaced, and
                nothing else ever is.
            max_length (`int`, *optional*): longest history in items; the teacher's own by default.
            batch_size (`int`, *optional*, defaults to 128): rows per forward pass.
            max_error (`float`, *optional*, defaults to 0.0): how far the scores of a wide teacher may be off, root
                mean square in nats.

        Returns:
            [`TeacherCache`]

        Raises:
            CacheError: hidden states that are not finite, row ids that repeat or are negative, a folder that holds
                other files.
            ConfigurationError: a negative `max_error`, a `max_length` that the teacher cannot read.
        """
        if not max_error >= 0:
            raise ConfigurationError(f"max_error must not be negative, got {max_error}.")
        collator = SequenceCollator(max_length=max_length or teacher.config.max_length)

        def begin(folder):
            return _write_items(teacher, dataset, folder, collator, batch_size, max_error)

        def encode(folder, order):
            projection = _stored_projection(folder, teacher.device)
            for row_ids, positions, hidden in _encoded(teacher, dataset, order, collator, batch_size):
                hidden = hidden if projection is None else hidden.float() @ projection
                yield row_ids, positions, pack(hidden)

        return cls._build(directory, dataset, teacher, collator.max_length, begin, encode)

    @classmethod
    def for_teacher(cls, teacher, dataset: Dataset, directory: str | os.PathLike, **build_arguments) -> TeacherCache:
        """The cache in `directory` if it is whole and of this very teacher and data, else one built anew."""
        asked = {
            "max_length": build_arguments.get("max_length") or teacher.config.max_length,
            "max_error": build_arguments.get("max_error", 0.0),
        }
        return cls._find(directory, dataset, teacher, asked) or cls.build(
            teacher, dataset, directory, **build_arguments
        )

    @staticmethod
    def _row_type(facts: dict) -> np.dtype:
        return row_type(facts["hidden_size"])

    @staticmethod
    def _hash_of(teacher) -> str:
        return teacher.content_hash()

    def _unpack(self, rows: np.ndarray, device: torch.device | str) -> torch.Tensor:
        return unpack(rows, device)

    def item_vectors(self, width: int) -> torch.Tensor:
        """
        The teacher's item vectors in a student's width, for the student to begin with.

        They are the items' side of the best form of its scores in so few dimensions ([`reduce_teacher`]), of the size
        at which a student's hidden states of unit components give scores that spread as the teacher's do. Where the
        student is the wider one, its further dimensions are zero.

        Args:
            width (`int`): the student's number of dimensions.

        Returns:
            `torch.Tensor` of shape `(N + 1, width)`; row 0, padding, is zero.
        """
        positions = self.manifest["positions"]
        count = min(positions, _FITTED_POSITIONS_PER_DIMENSION * self.item_matrix.shape[1])
        hidden = unpack(self._gather(np.linspace(0, positions - 1, count, dtype=np.int64))).double()
        form = reduce_teacher(hidden.T @ hidden / len(hidden), self.item_matrix, max_rank=width)
        return form.item_vectors(width)


@torch.no_grad()
def _write_items(teacher, dataset, directory: Path, collator, batch_size: int, max_error: float) -> dict:
    """Write the item matrix, the teacher's own or the narrow one with its projection, and the vocabulary."""
    item_matrix = teacher.item_matrix().float()
    _check_finite(item_matrix[1:], "item matrix")
    tensors, reduction = {"item_matrix": item_matrix}, None
    if max_error > 0 and item_matrix.shape[1] > EXACT_WIDTH and len(dataset):
        # Where double precision is to be had.
        item_matrix = item_matrix.cpu() if item_matrix.device.type == "mps" else item_matrix
        form, reduction = _narrow_form(teacher, item_matrix, dataset, collator, batch_size, max_error)
        if form is not None:
            tensors = {"item_matrix": form.item_matrix, "projection": form.projection}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, directory / ITEM_MATRIX_NAME)
    if teacher.vocabulary is not None:
        teacher.vocabulary.save_pretrained(directory)
    items, width = tensors["item_matrix"].shape
    return {"num_items": items - 1, "hidden_size": width, "max_error": max_error, "reduction": reduction}


def _narrow_form(
    teacher, item_matrix, dataset, collator, batch_size: int, max_error: float
) -> tuple[LowRankTeacher | None, dict | None]:
    """The low-rank form and what it changes, measured on a sample; nothing if it is not half as wide."""
    width, counts = item_matrix.shape[1], position_counts(dataset, collator.max_length)
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
    return rows[np.argsort(-counts[rows], kind="stable")]


def _stored_projection(directory: Path, device: torch.device) -> torch.Tensor | None:
    """What takes the teacher's hidden states to the stored width, if anything has to."""
    with safe_open(directory / ITEM_MATRIX_NAME, "pt") as file:
        return file.get_tensor("projection").to(device) if "projection" in file.keys() else None  # noqa: SIM118


@torch.no_grad()
def _encoded(
    teacher, dataset, order, collator, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, torch.Tensor]]:
    """Batches of row ids `(P,)`, positions in the row `(P,)` and hidden states `(P, d_t)`, for the rows in `order`."""
    columns, device = dataset.select_columns(["item_ids", "row_id"]), teacher.device
    with evaluating(teacher):
        for begin in tqdm(range(0, len(order), batch_size), desc="Caching the teacher", leave=False):
            batch = collator(columns.__getitems__(order[begin : begin + batch_size].tolist()))
            hidden = teacher.encode(batch["item_ids"].to(device), batch["attention_mask"].to(device))
            mask = batch["attention_mask"].bool()
            rows, positions = mask.nonzero().T.numpy()
            hidden = hidden[mask.to(device)]
            _check_finite(hidden, "hidden state")
            yield batch["row_id"].numpy()[rows], positions, hidden


def _check_finite(values: torch.Tensor, what: str) -> None:
    if not torch.isfinite(values).all():
        raise CacheError(f"The teacher's {what} holds numbers that are not finite: did it diverge in training?")
