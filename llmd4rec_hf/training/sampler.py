# SPDX-License-Identifier: Apache-2.0
"""Which histories share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

from ..errors import ConfigurationError


# Batches whose rows are sorted by length together: enough that their lengths are alike, few enough that which
# histories meet still changes from epoch to epoch.
_BATCHES_PER_BUCKET = 50


class LengthBucketSampler(Sampler[int]):
    """
    Random order in which consecutive rows, taken `batch_size` at a time, have like lengths.

    The order follows from seed and epoch alone, so that a resumed epoch and every process see the same one. Batches of
    all lengths are mixed: sorting alone would let every stretch of training begin with its longest histories.

    Args:
        lengths (`Sequence[int]`): rows' lengths.
        batch_size (`int`): rows that are used together, over all processes and accumulated steps.
        seed (`int`, *optional*, defaults to 0): of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        bucket = self.batch_size * _BATCHES_PER_BUCKET
        batches = []
        for start in range(0, len(order), bucket):
            rows = order[start : start + bucket]
            rows = rows[np.argsort(-self.lengths[rows], kind="stable")]
            batches += [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        # A batch that is not full has to stay last: anywhere else it would shift the cuts of all that follow.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        random.shuffle(full)
        full += [batch for batch in batches if len(batch) < self.batch_size]
        return iter(np.concatenate(full).tolist() if full else [])


class PositionBudgetBatchSampler(Sampler[list[int]]):
    """
    Batches of like length, each with as many rows as a budget of padded positions allows: rows times the longest.

    From the longest row to the shortest, a batch ends where the next row would not fit. So the cuts follow from the
    lengths alone: each epoch has the same number of batches in the same shapes, hardly more than there are lengths.
    Which rows of one length meet, and in which order the steps come, follows from seed and epoch.

    Every process makes all batches and `accelerate` deals them out one after the other, so their number is a multiple
    of `num_processes`. A step has the same rows however many processes share its batches, as far as the last batch of
    all can be cut for them.

    Args:
        positions (`Sequence[int]`): rows' padded positions, each at least 1.
        max_positions (`int`): most padded positions of a batch.
        num_processes (`int`, *optional*, defaults to 1): that the batches are dealt to.
        batches_per_step (`int`, *optional*, defaults to `num_processes`): batches that are used together, over all
            processes and accumulated steps.
        seed (`int`, *optional*, defaults to 0): of the order.

    Raises:
        ConfigurationError: a row exceeds the budget, or there are too few rows for each process to have one.
    """

    def __init__(
        self,
        positions: Sequence[int],
        max_positions: int,
        num_processes: int = 1,
        batches_per_step: int | None = None,
        seed: int = 0,
    ):
        self.positions = np.asarray(positions)
        self.batches_per_step = batches_per_step or num_processes
        self.seed = seed
        self.epoch = 0
        self.starts = _batch_starts(-np.sort(-self.positions), max_positions, num_processes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that the batches of an epoch make; the last one may have fewer."""
        return -(-len(self) // self.batches_per_step)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng((self.seed, self.epoch))
        rows = random.permutation(len(self.positions))
        rows = rows[np.argsort(-self.positions[rows], kind="stable")]
        batches = [rows[start:end].tolist() for start, end in pairwise([*self.starts, len(rows)])]
        size = self.batches_per_step
        steps = [batches[first : first + size] for first in range(0, len(batches), size)]
        # The last one stays where it is: if it is not full, it would shift all steps that follow.
        steps, last = steps[:-1], steps[-1:]
        random.shuffle(steps)
        return chain(*steps, *last)


def _batch_starts(positions: np.ndarray, max_positions: int, num_processes: int) -> np.ndarray:
    """Where each batch starts among rows that are sorted from long to short."""
    count = len(positions)
    if count and positions[0] > max_positions:
        raise ConfigurationError(
            f"max_positions_per_batch={max_positions}, but the longest history takes {positions[0]} positions of a "
            f"batch: raise it to {positions[0]} or more, or lower the model's max_length."
        )
    starts, start = [], 0
    while start < count:
        starts.append(start)
        start += max_positions // int(positions[start])
    if starts:
        # As many as make their number a multiple, out of the last one.
        pieces = 1 + -len(starts) % num_processes
        starts[-1:] = starts[-1] + np.arange(pieces) * (count - starts[-1]) // pieces
    if len(starts) > count:
        raise ConfigurationError(
            f"{count} histories do not make a batch for each of {num_processes} processes: train in fewer processes"
            + (f", or raise max_positions_per_batch={max_positions}." if count >= num_processes else ".")
        )
    # Each batch needs a row: where the last ones lack it, it comes from those before.
    return np.minimum(starts, count - np.arange(len(starts), 0, -1)).astype(int)


class LengthSortedSampler(Sampler[int]):
    """Rows from longest to shortest: the least padding, for evaluation, where order does not matter."""

    def __init__(self, lengths: Sequence[int]):
        self.order = np.argsort(-np.asarray(lengths), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


class SamplerEpoch(TrainerCallback):
    """
    Tells the sampler of the training set which epoch begins.

    `Trainer` and `accelerate` do that too, but in an epoch that is resumed by several processes they do not reach it
    through their wrappers, and its order would be that of another epoch.

    Attributes:
        sampler ([`LengthBucketSampler`] or [`PositionBudgetBatchSampler`] or `None`): is told.
    """

    def __init__(self):
        self.sampler: LengthBucketSampler | PositionBudgetBatchSampler | None = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.sampler is not None:
            # In the middle of an epoch that is resumed, its number and how much of it is done.
            self.sampler.set_epoch(int(state.epoch or 0))
