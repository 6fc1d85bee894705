# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cached_rows import (
    MAX_LENGTH,
    NUM_ITEMS,
    ROWS,
    collate,
    live,
    lookup,
    make_dataset,
    make_teacher,
)

from llmd4rec_hf.distillation import TeacherCache, distillation_loss, stored_rows, stored_teacher, teacher_cache
from llmd4rec_hf.distillation.low_rank import LowRankTeacher, score_errors
from llmd4rec_hf.errors import CacheError, ConfigurationError
from llmd4rec_hf.models import GRU4RecConfig, GRU4RecModel, SASRecConfig, SASRecModel


# --- what it gives back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, [4, 2, 0, 3, 1], [2], [1, 3]])
def test_lookup_is_live_encoding_exactly(cache, teacher, dataset, order):
    batch = collate(dataset, order)
    hidden = lookup(cache, batch)
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, live(teacher, batch))


def test_single_precision_is_stored_as_it_is(dataset, tmp_path):
    """Batches of one row give live encoding the very shapes that the cache was computed with."""
    teacher = make_teacher().float()
    cache = TeacherCache.build(teacher, dataset, tmp_path / "cache", batch_size=1)
    for row in range(len(dataset)):
        batch = collate(dataset, [row])
        assert torch.equal(lookup(cache, batch), live(teacher, batch))


def test_item_matrix_is_the_teachers(cache, teacher):
    assert torch.equal(cache.item_matrix, teacher.item_matrix().detach().float())


@pytest.mark.parametrize(("model", "config"), [(SASRecModel, SASRecConfig), (GRU4RecModel, GRU4RecConfig)])
def test_any_recommender(model, config, dataset, tmp_path):
    teacher = make_teacher(1, model, config)
    cache = TeacherCache.build(teacher, dataset, tmp_path / "cache")
    batch = collate(dataset)
    assert torch.equal(lookup(cache, batch), live(teacher, batch))


@pytest.mark.parametrize("max_length", [1, 2, 4])
def test_a_student_that_reads_less_finds_its_positions(cache, teacher, dataset, max_length):
    """The teacher goes on to see its own, longer history: the student gets the newest of its positions."""
    short, full = collate(dataset, max_length=max_length), collate(dataset)
    hidden = live(teacher, full).split((full["labels"] != -100).sum(dim=1).tolist())
    expected = torch.cat([states[-max_length:] for states in hidden])
    assert torch.equal(lookup(cache, short), expected)


def test_only_some_positions_are_labelled(cache, teacher, dataset):
    """Wherever a student asks, not only at every item: say, at the last one alone."""
    batch = collate(dataset)
    last = batch["attention_mask"].sum(dim=1) - 1
    labels = torch.full_like(batch["labels"], -100)
    rows = torch.arange(len(last))
    labels[rows, last] = batch["labels"][rows, last]
    batch["labels"] = labels
    assert torch.equal(lookup(cache, batch), live(teacher, batch))


def test_no_labelled_position(cache, dataset):
    batch = collate(dataset)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert lookup(cache, batch).shape == (0, 8)


def test_what_is_looked_up_may_be_written_to(cache, dataset):
    batch = collate(dataset)
    before = lookup(cache, batch)
    lookup(cache, batch).zero_()
    assert torch.equal(lookup(cache, batch), before)


@pytest.mark.parametrize("format_name", [None, "numpy", "torch"])
def test_datasets_of_any_format(teacher, dataset, tmp_path, format_name):
    cache = TeacherCache.build(teacher, dataset.with_format(format_name), tmp_path / "cache")
    cache.check(dataset=dataset)
    batch = collate(dataset)
    assert torch.equal(lookup(cache, batch), live(teacher, batch))


def test_kl_through_the_cache_is_kl_through_live_scores(cache, teacher, dataset):
    student = make_teacher(7).float().eval()
    batch = collate(dataset, max_length=MAX_LENGTH)
    keep = batch["labels"] != -100
    hidden = student.encode(batch["item_ids"])[keep]
    matrix, labels = student.item_matrix(), batch["labels"][keep]
    cached = distillation_loss(hidden, matrix, labels, lookup(cache, batch), cache.item_matrix, weighting="none")
    scores = (hidden @ matrix.T)[:, 1:]
    teacher_scores = (live(teacher, batch) @ teacher.item_matrix().float().T)[:, 1:]
    expected = torch.nn.functional.kl_div(
        scores.log_softmax(dim=1), teacher_scores.log_softmax(dim=1), log_target=True, reduction="batchmean"
    )
    assert expected.item() > 1e-3
    assert cached.kl.item() == pytest.approx(expected.item(), abs=1e-5)


# --- wide teachers ---------------------------------------------------------------------------------------------------


WIDE = 160


def divergence(scores, other):
    """Mean KL in nats, from scores with padding in column 0."""
    log_p, log_q = scores[:, 1:].double().log_softmax(dim=1), other[:, 1:].double().log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).mean().item()


def test_a_wide_teacher_takes_two_bytes_a_number(wide_teacher, dataset, tmp_path):
    cache = TeacherCache.build(wide_teacher, dataset, tmp_path / "cache")
    batch = collate(dataset)
    hidden, exact = lookup(cache, batch), live(wide_teacher, batch)
    assert hidden.dtype == torch.float32
    assert cache._shards[0].itemsize == 2 * WIDE + 4
    # Half a step of the row's own scale, and the last bits of a float32.
    assert ((hidden - exact).abs() <= exact.abs().amax(dim=1, keepdim=True) / 32767 * 0.501).all()
    assert torch.equal(cache.item_matrix, wide_teacher.item_matrix().detach().float())
    assert divergence(exact @ cache.item_matrix.T, hidden @ cache.item_matrix.T) < 1e-8


def test_without_an_error_to_spend_nothing_is_narrowed(wide_teacher, dataset, tmp_path):
    cache = TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=0.0)
    assert cache.manifest["hidden_size"] == WIDE
    assert cache.manifest["reduction"] is None
    assert not cache.is_reduced


@pytest.mark.parametrize("max_error", [1e-3, 0.05])
def test_a_wide_teacher_is_narrowed_within_the_error(wide_teacher, dataset, tmp_path, max_error):
    cache = TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=max_error)
    batch = collate(dataset)
    exact = live(wide_teacher, batch) @ wide_teacher.item_matrix().detach().float().T
    stored = lookup(cache, batch) @ cache.item_matrix.T
    difference = (stored - exact)[:, 1:]
    error = (difference - difference.mean(dim=1, keepdim=True)).square().mean().sqrt().item()
    facts = cache.manifest["reduction"]
    assert cache.is_reduced
    assert cache.manifest["hidden_size"] == cache.item_matrix.shape[1] <= 8
    assert facts["teacher_width"] == WIDE
    assert facts["positions"] == cache.manifest["positions"] == len(exact)
    assert error <= max_error * 1.001
    assert facts["score_error"] == pytest.approx(error, rel=1e-2, abs=1e-6)
    assert facts["kl"] == pytest.approx(divergence(exact, stored), rel=1e-2, abs=1e-9)


def test_a_larger_error_leaves_fewer_dimensions(wide_teacher, dataset, tmp_path):
    widths = [
        TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=error).manifest["hidden_size"]
        for error in (1e-4, 0.4, 100.0)
    ]
    assert widths[0] == 8
    assert widths[0] > widths[1] > widths[2] == 1


@pytest.mark.parametrize(("rank", "narrowed"), [(WIDE // 2, True), (WIDE // 2 + 1, False)])
def test_a_teacher_that_needs_more_than_half_its_width_stays_as_it_is(
    wide_teacher, dataset, tmp_path, monkeypatch, rank, narrowed
):
    items = wide_teacher.item_matrix().detach().float()[:, :rank]
    form = LowRankTeacher(torch.eye(WIDE)[:, :rank], items, error=0.0, sizes=torch.ones(rank))
    monkeypatch.setattr(teacher_cache, "reduce_teacher", lambda *_: form)
    cache = TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=0.05)
    assert cache.is_reduced == narrowed
    assert cache.manifest["hidden_size"] == (rank if narrowed else WIDE)
    assert narrowed or torch.equal(cache.item_matrix, wide_teacher.item_matrix().detach().float())


@pytest.mark.parametrize("width", [8, 128])
def test_a_narrow_teacher_is_kept_exactly_whatever_error_is_allowed(dataset, tmp_path, width):
    teacher = make_teacher(width=width)
    cache = TeacherCache.build(teacher, dataset, tmp_path / "cache", max_error=1.0)
    batch = collate(dataset)
    assert torch.equal(lookup(cache, batch), live(teacher, batch))
    assert not cache.is_reduced


def test_the_stated_error_is_that_of_what_is_stored(wide_teacher, dataset, tmp_path, monkeypatch):
    """Rounded too, where the narrow form is still a wide one."""
    monkeypatch.setattr(stored_rows, "EXACT_WIDTH", 4)
    cache = TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=1e-3)
    batch, items = collate(dataset), wide_teacher.item_matrix().detach().float()
    error, _ = score_errors(live(wide_teacher, batch), items, lookup(cache, batch), cache.item_matrix)
    assert cache.manifest["reduction"]["score_error"] == pytest.approx(error, rel=1e-2)


def test_the_narrow_form_is_found_from_a_sample(wide_teacher, tmp_path, monkeypatch):
    """Sixteen rows to find it, others to measure it, and each row once to store it."""
    monkeypatch.setattr(teacher_cache, "_FITTED_POSITIONS_PER_DIMENSION", 0.3)
    monkeypatch.setattr(teacher_cache, "_CHECKED_POSITIONS", 6)
    rows = {row: [1 + row % 9, 1 + (row * 5) % 9, 3, 1 + (row * 2) % 9] for row in range(60)}
    encoded, orders = [], []
    encode, encode_rows = SASRecModel.encode, teacher_cache._encoded
    monkeypatch.setattr(
        teacher_cache, "_encoded", lambda *args: orders.append(set(args[2].tolist())) or encode_rows(*args)
    )
    monkeypatch.setattr(
        SASRecModel, "encode", lambda self, items, *rest: encoded.append(len(items)) or encode(self, items, *rest)
    )
    cache = TeacherCache.build(wide_teacher, make_dataset(rows), tmp_path / "cache", max_error=0.01)
    # 48 positions at three a row, then six, then all.
    assert encoded == [16, 2, 60]
    assert cache.manifest["reduction"]["positions"] == 6
    fitted, checked, stored = orders
    assert not fitted & checked
    assert stored == set(range(60))


@pytest.mark.parametrize("max_error", [-0.1, float("nan")])
def test_an_error_that_is_none(wide_teacher, dataset, tmp_path, max_error):
    with pytest.raises(ConfigurationError, match="max_error must not be negative"):
        TeacherCache.build(wide_teacher, dataset, tmp_path / "cache", max_error=max_error)


@pytest.mark.parametrize("what", ["hidden state", "item matrix"])
@pytest.mark.parametrize("width", [8, WIDE])
def test_a_teacher_that_diverged_is_named(dataset, tmp_path, width, what):
    teacher = make_teacher(width=width)
    weight = teacher.final_norm.weight if what == "hidden state" else teacher.item_embedding.weight
    weight.data[-1] = float("nan")
    with pytest.raises(CacheError, match=f"{what} holds numbers that are not finite"):
        TeacherCache.build(teacher, dataset, tmp_path / "cache", max_error=0.01)


def test_the_padding_of_an_item_matrix_may_hold_anything(dataset, tmp_path):
    teacher = make_teacher()
    items = teacher.item_matrix().detach().clone()
    items[0] = float("nan")
    teacher.item_matrix = lambda: items
    cache = TeacherCache.build(teacher, dataset, tmp_path / "cache")
    assert torch.equal(cache.item_matrix[1:], items[1:].float())


def test_a_folder_of_something_else_is_left_alone(teacher, dataset, tmp_path):
    folder = tmp_path / "mine"
    TeacherCache.build(teacher, dataset, folder)
    (folder / "thesis.txt").write_text("all of it")
    for build in (TeacherCache.build, TeacherCache.for_teacher):
        with pytest.raises(CacheError, match="mine holds 'thesis.txt', which is no part of a teacher cache"):
            build(make_teacher(seed=5), dataset, folder / ".." / "mine")
    assert (folder / "thesis.txt").read_text() == "all of it"
    with pytest.raises(CacheError, match="is a file: give the teacher cache a folder"):
        TeacherCache.build(teacher, dataset, folder / "thesis.txt")


def test_the_folder_one_stands_in(teacher, dataset, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    TeacherCache.build(teacher, dataset, ".")
    assert (tmp_path / "here" / "manifest.json").is_file()


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_is_left_as_it_was(dataset, tmp_path, training):
    teacher = make_teacher().train(training)
    before = teacher.content_hash()
    TeacherCache.build(teacher, dataset, tmp_path / "cache")
    assert teacher.content_hash() == before
    assert all(module.training == training for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_files(cache, tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "a .partial folder is left"
    names = sorted(path.name for path in cache.directory.iterdir())
    assert names == ["hidden-00000-of-00001.npy", "item_matrix.safetensors", "manifest.json", "offsets.npy"]
    assert np.load(cache.directory / names[0], allow_pickle=False)["hidden"].dtype == np.float32
    assert np.load(cache.directory / names[-1], allow_pickle=False).dtype == np.int64
    positions = sum(min(len(items) - 1, MAX_LENGTH) for items in ROWS.values())
    assert cache.manifest["positions"] == positions
    assert repr(cache) == f"TeacherCache({positions} positions of width 8, 9 items)"


def test_a_file_with_python_objects_is_refused(cache):
    """Even with a manifest that vouches for it: a cache may come from elsewhere, and unpickling runs code."""
    path = cache.directory / "offsets.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    cache.manifest["files"]["offsets.npy"] = stored_teacher.file_facts(path)
    (cache.directory / "manifest.json").write_text(json.dumps(cache.manifest))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        TeacherCache(cache.directory)


def test_build_replaces_what_is_there(cache, dataset, tmp_path):
    (cache.directory / "hidden-00001-of-00002.npy").touch()
    leftover = tmp_path / "cache.partial"
    leftover.mkdir()
    (leftover / "torn").touch()
    other = make_teacher(1)
    rebuilt = TeacherCache.build(other, dataset, cache.directory)
    rebuilt.check(teacher=other)
    assert not (cache.directory / "hidden-00001-of-00002.npy").exists()
    assert not leftover.exists()


def test_a_build_that_fails_leaves_the_old_cache(cache, teacher, dataset, monkeypatch):
    monkeypatch.setattr(SASRecModel, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TeacherCache.build(make_teacher(1), dataset, cache.directory)
    TeacherCache(cache.directory).check(teacher=teacher, dataset=dataset)


def test_a_teacher_cannot_be_made_to_read_more_than_it_can(teacher, dataset, tmp_path):
    with pytest.raises(ConfigurationError, match="reads at most 6"):
        TeacherCache.build(teacher, dataset, tmp_path / "cache", max_length=7)


@pytest.mark.parametrize("row_ids", [[0, 1, 1, 2, 3], [0, 1, -1, 2, 3]])
def test_bad_row_ids(teacher, dataset, tmp_path, row_ids):
    rows = dataset.remove_columns("row_id").add_column("row_id", row_ids)
    with pytest.raises(CacheError, match="unique, non-negative row ids"):
        TeacherCache.build(teacher, rows, tmp_path / "cache")


def test_row_ids_that_are_no_numbers_of_rows(teacher, dataset, tmp_path):
    """A cache has an offset for each id, and would ask for terabytes."""
    rows = dataset.remove_columns("row_id").add_column("row_id", [0, 1, 2, 10**12, 3])
    with pytest.raises(CacheError, match="largest row id of 5 rows is 1000000000000.*number the rows from 0"):
        TeacherCache.build(teacher, rows, tmp_path / "cache")


def test_as_many_rows_as_there_are_ids_may_be_numbered(teacher, dataset, tmp_path, monkeypatch):
    """However many that are: what is refused are ids far beyond the rows' number."""
    monkeypatch.setattr(stored_teacher, "_LARGEST_ROW_ID", 3)
    assert max(dataset["row_id"]) > 3
    TeacherCache.build(teacher, dataset, tmp_path / "cache")


# --- item vectors for a student --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 8, 12])
def test_item_vectors_spread_a_students_scores_as_the_teachers(teacher, cache, width):
    vectors = cache.item_vectors(width)
    assert vectors.shape == (NUM_ITEMS + 1, width)
    assert not vectors[0].any()
    hidden = torch.from_numpy(cache._gather(np.arange(cache.manifest["positions"]))["hidden"]).double()
    scores = hidden @ cache.item_matrix[1:].double().T
    centred = scores - scores.mean(dim=1, keepdim=True)
    # What the vectors span can hold of the scores; all of it from the teacher's own width on.
    left, singular, right = torch.linalg.svd(centred, full_matrices=False)
    spread = (singular[:width].square().sum() / centred.numel()).sqrt().item()
    assert vectors[1:].square().sum(dim=1).mean().sqrt().item() == pytest.approx(spread, rel=1e-4)
    # Its best form is that of the singular vectors, each with the root of its share.
    kept = min(width, 8)
    similarity = vectors[1:].double() @ vectors[1:].double().T
    expected = right[:kept].T @ (singular[:kept, None] * right[:kept])
    torch.testing.assert_close(similarity / similarity.trace(), expected / expected.trace(), atol=1e-4, rtol=1e-3)
    assert not vectors[:, 8:].any()


def test_item_vectors_of_a_large_cache_are_found_from_positions_of_all_its_rows(cache, monkeypatch):
    monkeypatch.setattr(teacher_cache, "_FITTED_POSITIONS_PER_DIMENSION", 1)
    gathered, gather = [], cache._gather
    monkeypatch.setattr(cache, "_gather", lambda index: gathered.extend(index.tolist()) or gather(index))
    cache.item_vectors(3)
    # Eight of eighteen, from the first to the last.
    assert gathered == [0, 2, 4, 7, 9, 12, 14, 17]
