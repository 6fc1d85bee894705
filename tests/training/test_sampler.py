# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmd4rec_hf.training.sampler import LengthBucketSampler, LengthSortedSampler


@given(
    lengths=st.lists(st.integers(2, 60), max_size=300),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_row_comes_exactly_once(lengths, batch_size, seed, epoch):
    sampler = LengthBucketSampler(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_batches_are_of_like_length_and_in_mixed_order():
    lengths = np.random.default_rng(0).integers(2, 52, size=1000)
    order = np.array(list(LengthBucketSampler(lengths, batch_size=20)))
    batches = lengths[order].reshape(-1, 20)
    assert (batches.max(axis=1) - batches.min(axis=1)).mean() < 2
    # Sorting alone would make this correlation 1.
    assert abs(np.corrcoef(np.arange(50), batches.mean(axis=1))[0, 1]) < 0.5


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = LengthBucketSampler([3, 4, 5, 6] * 10, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_only_the_last_batch_is_not_full():
    # 103 rows in batches of 10: the three left over must not shift the cuts of the batches after them.
    lengths = np.arange(103) % 50 + 2
    rows = np.array(list(LengthBucketSampler(lengths, 10)))
    spread = [np.ptp(lengths[rows[start : start + 10]]) for start in range(0, 100, 10)]
    assert max(spread) <= 6


def test_sorted_sampler_goes_from_long_to_short_and_keeps_the_order_of_ties():
    assert list(LengthSortedSampler([3, 5, 3, 9])) == [3, 1, 0, 2]
