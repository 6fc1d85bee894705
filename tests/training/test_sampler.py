# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import TrainerState

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.training.sampler import (
    LengthBucketSampler,
    LengthSortedSampler,
    PositionBudgetBatchSampler,
    SamplerEpoch,
)


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


def test_which_histories_meet_changes_from_epoch_to_epoch():
    sampler = LengthBucketSampler(range(2, 302), batch_size=2)
    pairs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        pairs.append({frozenset(order[first : first + 2]) for first in range(0, 300, 2)})
    assert pairs[0] != pairs[1]


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = LengthBucketSampler([3, 4, 5, 6] * 10, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    # A run with the next seed must not see the same orders an epoch later.
    assert order(1, 2) != order(2, 1)


def test_only_the_last_batch_is_not_full():
    # 103 rows in batches of 10: the three left over must not shift the cuts of the batches after them.
    lengths = np.arange(103) % 50 + 2
    rows = np.array(list(LengthBucketSampler(lengths, 10)))
    spread = [np.ptp(lengths[rows[start : start + 10]]) for start in range(0, 100, 10)]
    assert max(spread) <= 6


def test_sorted_sampler_goes_from_long_to_short_and_keeps_the_order_of_ties():
    assert list(LengthSortedSampler([3, 5, 3, 9])) == [3, 1, 0, 2]


# Sorted: 5 4 3 3 2 2. With 10 positions 5 4 fit (2 x 5), 3 3 2 fit (3 x 3), and 2 is left.
POSITIONS = [2, 5, 3, 3, 4, 2]


def test_a_batch_ends_where_the_next_row_would_not_fit():
    batches = {frozenset(batch) for batch in PositionBudgetBatchSampler(POSITIONS, 10)}
    assert batches in [
        {frozenset({1, 4}), frozenset({2, 3, short}), frozenset({shortest})} for short, shortest in [(0, 5), (5, 0)]
    ]


@pytest.mark.parametrize(
    ("positions", "processes", "starts"),
    [
        (POSITIONS, 1, [0, 2, 5]),
        # Of the last batch, a single row, no two can be made: one comes from the batch before.
        (POSITIONS, 2, [0, 2, 4, 5]),
        (POSITIONS, 3, [0, 2, 5]),
        (POSITIONS, 4, [0, 2, 4, 5]),
        (POSITIONS, 6, [0, 1, 2, 3, 4, 5]),
        # 2 x 5, 5 x 2: the last five rows in one batch, then in two and three of like size.
        ([5, 5, 2, 2, 2, 2, 2], 2, [0, 2]),
        ([5, 5, 2, 2, 2, 2, 2], 3, [0, 2, 4]),
        ([5, 5, 2, 2, 2, 2, 2], 4, [0, 2, 3, 5]),
        # Only the shortest rows leave room for a second one.
        ([5, 5, 10, 10, 10], 1, [0, 1, 2, 3]),
        ([], 2, []),
    ],
)
def test_each_process_gets_as_many_batches(positions, processes, starts):
    sampler = PositionBudgetBatchSampler(positions, 10, processes)
    assert sampler.starts.tolist() == starts
    assert len(sampler) == len(list(sampler)) == len(starts)
    # Where nothing else is said, a step has a batch for each process.
    assert sampler.steps_per_epoch == len(starts) // processes


def test_steps_are_of_like_length_and_in_mixed_order():
    positions = np.random.default_rng(0).integers(1, 51, size=5000)
    sampler = PositionBudgetBatchSampler(positions, 500, num_processes=2, batches_per_step=4)
    means = np.array([positions[batch].mean() for batch in sampler])
    steps = means[: len(means) // 4 * 4].reshape(-1, 4)
    assert np.ptp(steps, axis=1).mean() < 2
    assert abs(np.corrcoef(np.arange(len(steps)), steps.mean(axis=1))[0, 1]) < 0.4
    assert sampler.steps_per_epoch == -(-len(means) // 4)


def test_shapes_are_few_and_the_same_in_each_epoch():
    positions = np.random.default_rng(0).integers(1, 21, size=5000)
    sampler = PositionBudgetBatchSampler(positions, 256, num_processes=2)
    shapes, orders = [], []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        shapes.append(sorted((len(batch), positions[batch].max()) for batch in orders[-1]))
    assert shapes[0] == shapes[1] == shapes[2]
    # One for each length, and what is left at the end.
    assert len(set(shapes[0])) <= 20 + 2
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]
    # Nor are those of another seed an epoch later the same.
    assert list(PositionBudgetBatchSampler(positions, 256, 2, seed=1)) not in orders


@given(
    positions=st.lists(st.integers(1, 20), max_size=120),
    room=st.integers(0, 80),
    processes=st.integers(1, 5),
    accumulated=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_within_the_budget(positions, room, processes, accumulated, epoch):
    budget = max(positions, default=1) + room
    needed = -(-len(PositionBudgetBatchSampler(positions, budget)) // processes) * processes
    if needed > len(positions):
        with pytest.raises(ConfigurationError):
            PositionBudgetBatchSampler(positions, budget, processes)
        return
    sampler = PositionBudgetBatchSampler(positions, budget, processes, processes * accumulated)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(positions)))
    assert all(batch and len(batch) * max(positions[row] for row in batch) <= budget for batch in batches)
    assert len(batches) == len(sampler) == needed


@given(positions=st.lists(st.integers(1, 9), min_size=60, max_size=120), budget=st.integers(40, 100))
def test_a_step_has_the_same_rows_however_many_processes_share_it(positions, budget):
    def steps(processes):
        batches = list(PositionBudgetBatchSampler(positions, budget, processes, batches_per_step=4))
        return [sorted(sum(batches[first : first + 4], [])) for first in range(0, len(batches), 4)]

    # The last batch is cut for them.
    assume(len(positions) - PositionBudgetBatchSampler(positions, budget).starts[-1] >= 4)
    assert steps(1) == steps(2) == steps(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([50, 3], 32), r"max_positions_per_batch=32, but the longest history takes 50 positions.*to 50 or more"),
        (([3], 32, 2), r"^1 histories do not make a batch for each of 2 processes: train in fewer processes\.$"),
        (([3, 3, 3], 5, 2), r"3 histories do not.*, or raise max_positions_per_batch=5\."),
    ],
)
def test_rows_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        PositionBudgetBatchSampler(*arguments)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("budgeted", [True, False])
def test_a_resumed_epoch_goes_on_with_its_own_order(budgeted, processes):
    """As `Trainer` prepares, tells and skips; over several processes the wrappers hide the sampler."""
    lengths = [3, 4, 5, 6] * 10

    def loader():
        epoch = SamplerEpoch()
        if budgeted:
            epoch.sampler = PositionBudgetBatchSampler(lengths, 12, processes)
            batches = {"batch_sampler": epoch.sampler}
        else:
            epoch.sampler = LengthBucketSampler(lengths, 4 * processes)
            batches = {"sampler": epoch.sampler, "batch_size": 4}
        prepared = prepare_data_loader(
            DataLoader(range(40), **batches),
            torch.device("cpu"),
            processes,
            0,
            put_on_device=True,
            even_batches=not budgeted,
        )
        return prepared, epoch

    def rest(loader, epoch, state_epoch):
        epoch.on_epoch_begin(None, TrainerState(epoch=state_epoch), None)
        loader.set_epoch(1)
        return [batch.tolist() for batch in loader]

    whole = rest(*loader(), 1.0)
    for done in (2, 3):
        prepared, epoch = loader()
        assert rest(skip_first_batches(prepared, done), epoch, 1 + done / 5) == whole[done:]
