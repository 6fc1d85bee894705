# SPDX-License-Identifier: Apache-2.0
"""Which histories share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


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


class LengthSortedSampler(Sampler[int]):
    """Rows from longest to shortest: the least padding, for evaluation, where order does not matter."""

    def __init__(self, lengths: Sequence[int]):
        self.order = np.argsort(-np.asarray(lengths), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())
