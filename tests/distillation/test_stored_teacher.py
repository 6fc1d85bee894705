# SPDX-License-Identifier: Apache-2.0
"""What all caches have in common, on `TeacherCache`: shards of processes, checksums, and finding one that is there."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cached_rows import (
    MAX_LENGTH,
    NUM_ITEMS,
    ROWS,
    collate,
    flip_a_byte,
    live,
    lookup,
    make_dataset,
    make_teacher,
    truncate,
)
from datasets import Dataset

from llmd4rec_hf import processes as processes_module
from llmd4rec_hf.distillation import TeacherCache, stored_teacher
from llmd4rec_hf.errors import CacheError


# --- more processes than one -----------------------------------------------------------------------------------------


def build_with_processes(monkeypatch, processes, teacher, dataset, directory, **arguments):
    """Threads take the place of processes: each has its own index and teacher, and they meet at a barrier."""
    barrier = threading.Barrier(processes, timeout=60)
    local = threading.local()

    class State:
        num_processes = processes
        process_index = property(lambda self: local.index)
        is_main_process = property(lambda self: local.index == 0)

    said = [None] * processes

    def gather(mine):
        said[local.index] = mine[0]
        barrier.wait()
        everything = list(said)
        barrier.wait()
        return everything

    monkeypatch.setattr(stored_teacher, "PartialState", State)
    monkeypatch.setattr(processes_module, "PartialState", State)
    monkeypatch.setattr(processes_module, "gather_object", gather)

    def run(index):
        local.index = index
        try:
            return TeacherCache.build(copy.deepcopy(teacher), dataset, directory, batch_size=2, **arguments)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_every_process_writes_its_rows(monkeypatch, teacher, dataset, tmp_path, processes):
    """Eight processes for five rows: some have nothing to write."""
    caches = build_with_processes(monkeypatch, processes, teacher, dataset, tmp_path / "cache")
    shards = [np.load(path) for path in (tmp_path / "cache").glob("hidden-*.npy")]
    assert len(shards) == processes
    assert all(map(len, shards)) == (processes < 5)
    for cache in caches:
        cache.check(dataset=dataset, teacher=teacher)
        for order in ([4, 2, 0, 3, 1], [3]):
            batch = collate(dataset, order)
            assert torch.equal(lookup(cache, batch), live(teacher, batch))
        assert lookup(cache, collate(dataset, max_length=2)).shape == (9, 8)


def test_every_process_narrows_the_teacher_alike(monkeypatch, wide_teacher, dataset, tmp_path):
    alone = TeacherCache.build(wide_teacher, dataset, tmp_path / "alone", batch_size=2, max_error=0.01)
    together = build_with_processes(monkeypatch, 3, wide_teacher, dataset, tmp_path / "cache", max_error=0.01)
    batch = collate(dataset)
    for cache in together:
        assert cache.manifest["reduction"] == alone.manifest["reduction"]
        assert torch.equal(cache.item_matrix, alone.item_matrix)
        torch.testing.assert_close(lookup(cache, batch), lookup(alone, batch))


def test_a_shard_of_another_process_is_checked_too(monkeypatch, teacher, dataset, tmp_path):
    build_with_processes(monkeypatch, 2, teacher, dataset, tmp_path / "cache")
    (tmp_path / "cache" / "hidden-00001-of-00002.npy").unlink()
    with pytest.raises(CacheError, match="hidden-00001-of-00002.npy is missing, torn or altered"):
        TeacherCache(tmp_path / "cache")


def test_a_cache_that_another_process_cannot_read_is_none_for_all(monkeypatch, teacher, dataset, tmp_path):
    """Building it again takes all of them."""

    def fail(work):
        work()
        raise CacheError("process 1: it is torn")

    TeacherCache.build(teacher, dataset, tmp_path / "cache", batch_size=2)
    assert TeacherCache._find(tmp_path / "cache", dataset, teacher, {}) is not None
    monkeypatch.setattr(stored_teacher, "on_every_process", fail)
    assert TeacherCache._find(tmp_path / "cache", dataset, teacher, {}) is None


# --- errors ----------------------------------------------------------------------------------------------------------


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match="There is no teacher cache in .*nowhere: build it with TeacherCache.build"):
        TeacherCache(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, lambda path: path.unlink()], ids=["torn", "flipped", "gone"]
)
@pytest.mark.parametrize("name", ["hidden-00000-of-00001.npy", "offsets.npy", "item_matrix.safetensors"])
def test_damaged_files(cache, name, damage):
    damage(cache.directory / name)
    with pytest.raises(CacheError, match=f"{name} is missing, torn or altered: build .* again"):
        TeacherCache(cache.directory)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', "null"])
def test_damaged_manifest(cache, content):
    (cache.directory / "manifest.json").write_text(content)
    with pytest.raises(CacheError, match=r"manifest.json is damaged .*build it with TeacherCache.build again"):
        TeacherCache(cache.directory)


def test_another_format_version(cache):
    cache.manifest["format_version"] = 99
    (cache.directory / "manifest.json").write_text(json.dumps(cache.manifest))
    with pytest.raises(CacheError, match="format version 99, this package reads 2"):
        TeacherCache(cache.directory)


def test_check_passes(cache, teacher, dataset):
    cache.check()
    cache.check(num_items=NUM_ITEMS, dataset=dataset, teacher=teacher)


def test_check_against_something_else(cache):
    changed = ROWS | {5: [2, 9, 5]}
    for other, name in [
        ({"num_items": NUM_ITEMS + 1}, "num_items"),
        ({"dataset": make_dataset(changed)}, "data_hash"),
        ({"dataset": make_dataset().select([0, 1])}, "data_hash"),
        ({"teacher": make_teacher(1)}, "teacher_hash"),
    ]:
        with pytest.raises(CacheError, match=f"does not fit: its {name} is .* Build it again"):
            cache.check(**other)


@pytest.mark.parametrize("row", [10, 1, 8, -1])
def test_a_row_that_was_not_cached(cache, dataset, row):
    """Beyond the last row id, between two, and below the first; beside rows that are there."""
    batch = collate(dataset, [0, 1])
    batch["row_id"][1] = row
    with pytest.raises(CacheError, match=f"Row {row} is not in the teacher cache"):
        lookup(cache, batch)


def test_a_student_that_reads_more(teacher, dataset, tmp_path):
    cache = TeacherCache.build(teacher, dataset, tmp_path / "cache", max_length=3)
    lookup(cache, collate(dataset, max_length=3))
    with pytest.raises(CacheError, match="The student reads more of row 9 than its teacher did: .* max_length"):
        lookup(cache, collate(dataset, [0, 2], max_length=4))


# --- reuse -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def builds(monkeypatch):
    """Counts the caches that are built."""
    calls = []
    build = TeacherCache.build.__func__
    monkeypatch.setattr(
        TeacherCache,
        "build",
        classmethod(lambda cls, *args, **kwargs: calls.append(args) or build(cls, *args, **kwargs)),
    )
    return calls


def test_for_teacher_builds_once(builds, teacher, dataset, tmp_path):
    for options in ({}, {}, {"max_length": None}, {"max_length": MAX_LENGTH}):
        cache = TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache", batch_size=2, **options)
        assert torch.equal(lookup(cache, collate(dataset)), live(teacher, collate(dataset)))
    assert len(builds) == 1


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, lambda path: path.unlink()], ids=["torn", "flipped", "gone"]
)
@pytest.mark.parametrize("name", ["hidden-00000-of-00001.npy", "manifest.json"])
def test_for_teacher_rebuilds_what_is_broken(builds, teacher, dataset, tmp_path, name, damage):
    TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    cache = TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache")
    assert len(builds) == 2
    assert torch.equal(lookup(cache, collate(dataset)), live(teacher, collate(dataset)))


def test_for_teacher_rebuilds_for_another_teacher_data_or_length(builds, teacher, dataset, tmp_path):
    TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache", max_length=3)
    TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache")
    cache = TeacherCache.for_teacher(teacher, dataset, tmp_path / "cache")
    assert len(builds) == 2
    assert torch.equal(lookup(cache, collate(dataset)), live(teacher, collate(dataset)))
    other = make_teacher(1)
    TeacherCache.for_teacher(other, dataset, tmp_path / "cache").check(teacher=other)
    fewer = dataset.select([0, 1])
    TeacherCache.for_teacher(other, fewer, tmp_path / "cache").check(dataset=fewer)
    assert len(builds) == 4


def test_for_teacher_rebuilds_for_another_error(builds, wide_teacher, dataset, tmp_path):
    for max_error in (0.05, 0.05, 0.0, 1e-3, 1e-3):
        cache = TeacherCache.for_teacher(wide_teacher, dataset, tmp_path / "cache", max_error=max_error)
        assert cache.manifest["max_error"] == max_error
    assert len(builds) == 3


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [([1, 2], "Row 5 has fewer items"), ([1] * 5, "Row 5 has more items")],
)
def test_rows_that_are_not_as_long_as_they_say(teacher, dataset, tmp_path, item_ids, message):
    """As where histories are cut and `length` stays."""
    rows = dataset.to_list()
    row = next(row for row in rows if row["row_id"] == 5)
    row["item_ids"] = item_ids
    with pytest.raises(CacheError, match=message):
        TeacherCache.build(teacher, Dataset.from_list(rows), tmp_path / "cache")
