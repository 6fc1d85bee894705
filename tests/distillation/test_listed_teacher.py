# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from cached_rows import (
    MAX_LENGTH,
    NUM_ITEMS,
    ROWS,
    collate,
    flip_a_byte,
    lookup,
    make_dataset,
    truncate,
)

from llmd4rec_hf import (
    ItemVocabulary,
    ListedTeacherCache,
    TeacherCache,
    distillation_loss,
)
from llmd4rec_hf.distillation import listed_teacher
from llmd4rec_hf.errors import CacheError, ConfigurationError, DataError


VOCABULARY = ItemVocabulary([f"B{item}" for item in range(1, NUM_ITEMS + 1)])


def distribution(history) -> np.ndarray:
    """Probabilities of all items that depend on the whole history and on its order."""
    logits = np.zeros(NUM_ITEMS)
    for age, item in enumerate(reversed(history)):
        logits += np.cos(1.7 * item + np.arange(NUM_ITEMS)) / (1 + age)
    return np.exp(logits) / np.exp(logits).sum()


def black_box(size=3):
    """Best items and their log-probabilities, as arrays, in ids 1..N."""

    def teacher(histories):
        probabilities = np.stack([distribution(history) for history in histories])
        best = np.argsort(-probabilities, axis=1)[:, :size]
        return best + 1, np.log(np.take_along_axis(probabilities, best, axis=1))

    return teacher


def external_black_box(size=3):
    """The same in external ids, as lists."""

    def teacher(histories):
        assert all(isinstance(item, str) for history in histories for item in history)
        ids, log_probs = black_box(size)([[int(item[1:]) for item in history] for history in histories])
        return [[f"B{item}" for item in items] for items in ids], log_probs.tolist()

    return teacher


def answering(ids, log_probs):
    """A teacher with the same answer for every history."""
    return lambda histories: ([ids] * len(histories), [log_probs] * len(histories))


def build(directory, teacher=None, dataset=None, **options):
    options = {"name": "box-1", "num_items": NUM_ITEMS, "list_size": 3, "max_length": MAX_LENGTH, **options}
    dataset = make_dataset() if dataset is None else dataset
    return ListedTeacherCache.build(teacher or black_box(), dataset, directory, **options)


@pytest.fixture
def cache(tmp_path):
    return build(tmp_path / "cache")


def asked_for(order, max_length=MAX_LENGTH, longest=MAX_LENGTH):
    """The histories behind the labels of a batch, by definition."""
    rows = [list(ROWS.values())[index] for index in order]
    ends = [(row, end) for row in rows for end in range(max(1, len(row) - max_length), len(row))]
    return [row[max(0, end - longest) : end] for row, end in ends]


# --- what it gives back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [2], [1, 3]])
@pytest.mark.parametrize("max_length", [1, 2, 4, MAX_LENGTH])
def test_lookup_is_what_the_teacher_says(cache, order, max_length):
    """Also for students that read less than it did: it has seen the longer history."""
    lists = lookup(cache, collate(order=order, max_length=max_length))
    ids, log_probs = black_box()(asked_for(order, max_length))
    assert lists.ids.tolist() == ids.tolist()
    assert torch.equal(lists.log_probs, torch.from_numpy(log_probs).float())
    assert (lists.ids.dtype, lists.log_probs.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("rows_at_a_time", [1024, 2])
def test_every_history_is_asked_for_once(tmp_path, monkeypatch, rows_at_a_time):
    monkeypatch.setattr(listed_teacher, "_ROWS_AT_A_TIME", rows_at_a_time)
    seen = []

    def teacher(histories):
        seen.append([list(history) for history in histories])
        return black_box()(histories)

    build(tmp_path / "cache", teacher, batch_size=4)
    assert [len(batch) for batch in seen] == [4, 4, 4, 4, 2]
    assert sorted(sum(seen, [])) == sorted(asked_for(range(5)))


def test_external_ids(tmp_path, cache):
    other = build(tmp_path / "external", external_black_box(), num_items=None, vocabulary=VOCABULARY)
    batch = collate()
    assert torch.equal(lookup(other, batch).ids, lookup(cache, batch).ids)
    assert torch.equal(lookup(other, batch).log_probs, lookup(cache, batch).log_probs)
    assert (other.vocabulary, cache.vocabulary) == (VOCABULARY, None)
    assert other.manifest["num_items"] == NUM_ITEMS


def test_external_ids_that_are_large_numbers_keep_every_digit(tmp_path):
    """Beside an empty list, of which numpy makes floating-point numbers."""
    ids = [2**60 + item for item in range(NUM_ITEMS)]
    answers = [[ids[3]], []]
    cache = build(
        tmp_path / "cache",
        lambda histories: ([answers[len(h) % 2] for h in histories], [[-1.0][: 1 - len(h) % 2] for h in histories]),
        num_items=None,
        vocabulary=ItemVocabulary(ids),
    )
    assert lookup(cache, collate(order=[0])).ids[:, 0].tolist() == [0, 4, 0]


def test_lists_of_different_lengths_and_any_order(tmp_path):
    """Longer ones give up their least probable items, shorter ones are filled up."""
    answers = {1: ([5], [0.4]), 2: ([7, 3, 1, 2], [0.1, 0.2, 0.05, 0.3]), 3: ([], [])}

    def teacher(histories):
        ids, probabilities = zip(*(answers[len(history)] for history in histories), strict=True)
        return ids, [np.log(entry) for entry in probabilities]

    cache = build(tmp_path / "cache", teacher, make_dataset({0: [1, 2, 3, 4]}))
    lists = lookup(cache, collate(make_dataset({0: [1, 2, 3, 4]})))
    assert lists.ids.tolist() == [[5, 0, 0], [2, 3, 7], [0, 0, 0]]
    expected = torch.full((3, NUM_ITEMS), 0.6 / 8)
    expected[0, 4] = 0.4
    expected[1] = 0.4 / 6
    expected[1, [1, 2, 6]] = torch.tensor([0.3, 0.2, 0.1])
    expected[2] = 1 / 9
    torch.testing.assert_close(lists.dense(NUM_ITEMS).exp(), expected)


def test_of_equals_those_that_are_listed_first_are_kept(tmp_path):
    """Twenty that are more probable, and of twenty others the first ten."""
    teacher = answering(range(40, 0, -1), [-5.0, -6.0] * 20)
    cache = build(tmp_path / "cache", teacher, num_items=40, list_size=30)
    assert lookup(cache, collate()).ids[0].tolist() == [*range(40, 0, -2), *range(39, 19, -2)]


def test_tensors_will_do(tmp_path, cache):
    def teacher(histories):
        return [torch.from_numpy(part) for part in black_box()(histories)]

    other = build(tmp_path / "tensors", teacher)
    assert torch.equal(lookup(other, collate()).ids, lookup(cache, collate()).ids)


def test_no_labelled_position(cache):
    batch = collate()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert lookup(cache, batch).ids.shape == (0, 3)


def test_what_is_looked_up_may_be_written_to(cache):
    before = lookup(cache, collate()).ids.clone()
    lookup(cache, collate()).ids.zero_()
    assert torch.equal(lookup(cache, collate()).ids, before)


@pytest.mark.parametrize("format_name", ["numpy", "torch"])
def test_datasets_of_any_format(cache, tmp_path, format_name):
    dataset = make_dataset().with_format(format_name)
    other = build(tmp_path / "other", external_black_box(), dataset, num_items=None, vocabulary=VOCABULARY)
    assert torch.equal(lookup(other, collate()).ids, lookup(cache, collate()).ids)


def test_lists_of_all_items_teach_what_the_model_behind_them_teaches(tmp_path, make_crm):
    """A recommender as a black box, against the same one with its hidden states and item matrix."""
    teacher, student = make_crm(1, num_items=NUM_ITEMS).eval(), make_crm(0, num_items=NUM_ITEMS).eval()

    @torch.no_grad()
    def ask(histories):
        last = [teacher.encode(torch.tensor([history]))[0, -1] for history in histories]
        log_probs = (torch.stack(last) @ teacher.item_matrix()[1:].T).log_softmax(dim=1)
        return np.tile(np.arange(1, NUM_ITEMS + 1), (len(histories), 1)), log_probs

    # Rows that no model cuts off: what a model sees of a longer one begins with the same item at all positions.
    rows = make_dataset({row: items[: MAX_LENGTH + 1] for row, items in ROWS.items()})
    batch = collate(rows)
    keep = batch["labels"] != -100
    hidden, items = student.encode(batch["item_ids"])[keep], student.item_matrix()
    states = TeacherCache.build(teacher, rows, tmp_path / "states")
    lists = build(tmp_path / "lists", ask, rows, list_size=NUM_ITEMS)
    options = {"temperature": 2.0, "kl_weight": 0.5}
    expected = distillation_loss(
        hidden, items, batch["labels"][keep], lookup(states, batch), states.item_matrix, **options
    )
    actual = distillation_loss(hidden, items, batch["labels"][keep], teacher_lists=lookup(lists, batch), **options)
    assert expected.kl.item() > 1e-3
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(actual.teacher_ranks, expected.teacher_ranks)


# --- building --------------------------------------------------------------------------------------------------------


def test_files(cache, tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "a .partial folder is left"
    names = sorted(path.name for path in cache.directory.iterdir())
    assert names == ["lists-00000-of-00001.npy", "manifest.json", "offsets.npy"]
    assert cache._shards[0].itemsize == 3 * (4 + 1)
    assert repr(cache) == "ListedTeacherCache(18 positions with lists of 3, 9 items)"
    facts = {"holds": "lists", "list_size": 3, "max_length": MAX_LENGTH, "positions": 18, "teacher_hash": "box-1"}
    assert cache.manifest.items() >= facts.items()


@pytest.mark.parametrize(("num_items", "width"), [(255, 1), (256, 2), (65_535, 2), (65_536, 4)])
def test_ids_take_what_the_catalogue_asks_for(tmp_path, num_items, width):
    cache = build(tmp_path / "cache", answering([num_items, 1], [-1.0, -2.0]), num_items=num_items, list_size=2)
    assert cache._shards[0].itemsize == 2 * (4 + width)
    assert lookup(cache, collate()).ids[0].tolist() == [num_items, 1]


def test_no_list_is_longer_than_the_catalogue(tmp_path):
    cache = build(tmp_path / "cache", black_box(NUM_ITEMS), list_size=100)
    assert cache.manifest["list_size"] == NUM_ITEMS
    assert cache.manifest == build(tmp_path / "cache", black_box(NUM_ITEMS), list_size=100).manifest


def test_a_build_that_fails_leaves_the_old_cache(cache):
    with pytest.raises(ZeroDivisionError):
        build(cache.directory, lambda histories: 1 / 0, name="box-2")
    ListedTeacherCache(cache.directory).check(teacher="box-1", dataset=make_dataset())


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (answering([4, 0], [-1.0, -2.0]), r"lists items 1\.\.9, got int64 in 0\.\.4"),
        (answering([10], [-1.0]), r"lists items 1\.\.9, got int64 in 10\.\.10"),
        (answering([1.0], [-1.0]), "got float64"),
        (answering([4, 4], [-1.0, -2.0]), "list for row 9, after 5 items, holds an item twice"),
        (answering([4, 5], [-1.0, math.nan]), "holds a log-probability that is not a number"),
        (answering([4, 5], [0.3, 0.2]), r"above 0 \(is it a probability, or a score without"),
        (answering([4, 5], [800.0, -1.0]), "above 0"),
        (answering([4, 5], [-0.1, -0.5]), "holds probabilities that add up to more than 1"),
        (answering([4, 5], np.log([0.501, 0.5005])), "holds probabilities that add up to more than 1"),
        (answering([4, 5], [-1.0]), "equally long: for 4 histories .* lengths"),
        (lambda histories: ([[1]], [[-1.0]]), "equally long: for 4 histories"),
        (lambda histories: None, "must return ids and log-probabilities"),
        (lambda histories: ([1] * len(histories), [-1.0] * len(histories)), "must return ids and log-probabilities"),
        (answering([1], ["much"]), "must return ids and log-probabilities"),
    ],
)
def test_bad_answers(tmp_path, teacher, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "cache", teacher, batch_size=4)
    assert not (tmp_path / "cache").exists()


def test_an_item_that_nobody_knows(tmp_path):
    with pytest.raises(DataError, match="not in the vocabulary, first 'B10'"):
        build(tmp_path / "cache", answering(["B1", "B10"], [-1.0, -2.0]), num_items=None, vocabulary=VOCABULARY)


def test_the_list_that_is_bad_is_named(tmp_path):
    def teacher(histories):
        return [[1, 2]] * len(histories), [[-1.0, math.nan if h == [3, 3, 1] else -2.0] for h in histories]

    with pytest.raises(DataError, match="row 2, after 3 items, holds"):
        build(tmp_path / "cache", teacher)


@pytest.mark.parametrize("surplus", [0.0, 9e-4])
def test_what_half_precision_adds_is_let_pass(tmp_path, surplus):
    cache = build(tmp_path / "cache", answering([4, 5], np.log([0.5 + surplus, 0.5])))
    assert lookup(cache, collate()).dense(NUM_ITEMS).exp()[0].tolist() == pytest.approx(
        [0, 0, 0, 0.5 + surplus, 0.5, 0, 0, 0, 0]
    )
    build(tmp_path / "certain", answering([4], np.log([1.0 + surplus])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": None}, "Give either a vocabulary or num_items"),
        ({"vocabulary": VOCABULARY}, "Give either a vocabulary or num_items"),
        ({"num_items": 0}, "must be at least 1, got 0"),
        ({"list_size": 0}, "list_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"name": None}, "name a string, got .* None"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(ConfigurationError, match=message):
        build(tmp_path / "cache", **options)


def test_bad_row_ids(tmp_path):
    with pytest.raises(CacheError, match="unique, non-negative row ids"):
        build(tmp_path / "cache", dataset=make_dataset({-1: [1, 2, 3]}))


# --- errors of a cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_byte, lambda path: path.unlink()],
    ids=["torn", "flipped", "gone"],
)
@pytest.mark.parametrize("name", ["lists-00000-of-00001.npy", "offsets.npy"])
def test_damaged_files(cache, name, damage):
    damage(cache.directory / name)
    with pytest.raises(CacheError, match=f"{name} is missing, torn or altered: .* with ListedTeacherCache.build"):
        ListedTeacherCache(cache.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "format version 99, this package reads 1"), ({"list_size": ...}, "no list_size")],
)
def test_another_manifest(cache, change, message):
    manifest = {key: value for key, value in (cache.manifest | change).items() if value is not ...}
    (cache.directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match=message):
        ListedTeacherCache(cache.directory)


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match="There is no teacher cache in .*: build it with ListedTeacherCache.build"):
        ListedTeacherCache(tmp_path)


def test_the_two_kinds_of_caches_are_told_apart(cache, make_crm, tmp_path):
    with pytest.raises(CacheError, match="holds 'lists', not 'hidden': build it with TeacherCache.build"):
        TeacherCache(cache.directory)
    TeacherCache.build(make_crm(num_items=NUM_ITEMS), make_dataset(), tmp_path / "states")
    with pytest.raises(CacheError, match="holds 'hidden', not 'lists': build it with ListedTeacherCache.build"):
        ListedTeacherCache(tmp_path / "states")


def test_check(cache):
    cache.check(num_items=NUM_ITEMS, dataset=make_dataset(), teacher="box-1")
    for other, name in [
        ({"num_items": NUM_ITEMS + 1}, "num_items"),
        ({"dataset": make_dataset(ROWS | {5: [2, 9, 5]})}, "data_hash"),
        ({"teacher": "box-2"}, "teacher_hash"),
    ]:
        with pytest.raises(CacheError, match=f"does not fit: its {name} is .* with ListedTeacherCache.build"):
            cache.check(**other)


def test_rows_and_positions_that_were_not_asked_for(tmp_path):
    cache = build(tmp_path / "cache", max_length=3)
    with pytest.raises(CacheError, match="The student reads more of row 9 than its teacher did"):
        lookup(cache, collate(order=[0, 2], max_length=4))
    with pytest.raises(CacheError, match="Row 1 is not in the teacher cache"):
        lookup(cache, collate(make_dataset({1: [1, 2]})))


def test_for_teacher_asks_once(tmp_path):
    calls = []

    def teacher(histories):
        calls.append(len(histories))
        return black_box()(histories)

    def find(dataset=None, **options):
        options = {"name": "box-1", "num_items": NUM_ITEMS, "max_length": MAX_LENGTH, **options}
        dataset = make_dataset() if dataset is None else dataset
        return ListedTeacherCache.for_teacher(teacher, dataset, tmp_path / "cache", **options)

    for number, options in enumerate(
        [{}, {"name": "box-2"}, {"list_size": 2}, {"max_length": 3}, {"dataset": make_dataset({0: [1, 2]})}], start=1
    ):
        for _ in range(2):
            cache = find(**options)
        assert len(calls) == number
    flip_a_byte(cache.directory / "offsets.npy")
    find(dataset=make_dataset({0: [1, 2]}))
    assert len(calls) == number + 1
