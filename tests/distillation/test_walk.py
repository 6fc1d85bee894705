# SPDX-License-Identifier: Apache-2.0
"""What the loss holds in memory, and that where it is cut changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from dense_loss import D, LargestResult, N, assert_same, chunked, dense, problem

from llmd4rec_hf.distillation import ListedScores, distillation_loss, walk
from llmd4rec_hf.distillation.walk import default_chunk_size, default_slice_size


pytestmark = pytest.mark.usefixtures("walk_by")


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_positions_times_items_is_never_held(teacher, temperature):
    positions, num_items, chunk_size = 64, 200, 8
    given = problem(positions=positions, num_items=num_items)
    with LargestResult() as largest:
        chunked(given, teacher, chunk_size=chunk_size, temperature=temperature)
    assert largest.elements == chunk_size * num_items < positions * num_items


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_chunks_slices_and_blocks_change_nothing(monkeypatch, temperature, teacher, precision):
    """What is chosen by size for large problems, forced upon a small one: none of them divides it evenly."""
    given = problem(seed=14)
    half = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with half:
        expected, expected_grads = chunked(given, teacher, temperature=temperature)
        monkeypatch.setitem(walk._SLICE_BYTES, "cpu", 2 * 4 * N)  # two rows
        monkeypatch.setattr(walk, "_SCORE_BLOCK_ITEMS", 3)  # three items
        monkeypatch.setattr(walk, "_GRADIENT_BLOCK_BYTES", 5 * 4 * D)  # five
        actual, grads = chunked(given, teacher, temperature=temperature, chunk_size=5)
    rounding = {"rtol": 2e-2, "atol": 2e-3} if precision == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(grads, expected_grads, **rounding)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.agreement, expected.agreement)
    assert torch.equal(actual.student_ranks, expected.student_ranks)


def at_exponents(given, temperature, student, teacher):
    """A problem whose hidden states are made as long as gives the two models exponents of up to these."""

    def with_bound(hidden, items, bound):
        longest = (hidden.norm(dim=1).max() * items.norm(dim=1).max()).item()
        return hidden.detach() * (bound * temperature * math.log(2) / longest)

    given.hidden = with_bound(given.hidden, given.items[1:], student)
    given.teacher_hidden = with_bound(given.teacher_hidden, given.teacher_items[1:], teacher)
    return given


@pytest.mark.parametrize("of_limit", [0.99, 1.01])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_rows_that_only_just_need_no_shift_and_those_that_do(temperature, of_limit):
    """On both sides of the limits, where float32 has all to hold that it is asked to."""
    student = of_limit * walk._LARGEST_EXPONENT / max(1, temperature)
    teacher = of_limit * walk._LARGEST_SUM_OF_EXPONENTS - student
    given = at_exponents(problem(seed=3), temperature, student, teacher)
    options = {"temperature": temperature, "weighting": "confidence"}
    assert_same(*chunked(given, **options), dense(given, **options), given.labels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "temperature"), [(60.0, -60.0, 1.0), (-60.0, 60.0, 1.0), (100.0, 1.0, 2.0)]
)
def test_rows_whose_quotients_or_powers_alone_would_overflow(student, teacher, temperature):
    """Each model's exponents are within the limit: not so the quotient of their sums, or the plain softmax's."""
    given = problem(seed=3)
    steps = torch.arange(len(given.items), dtype=torch.float64).unsqueeze(1) * 0.1
    given.hidden, given.teacher_hidden = torch.ones(2, len(given.labels), 1, dtype=torch.float64)
    given.hidden.requires_grad_()
    given.items, given.teacher_items = (student + steps).requires_grad_(), teacher - steps
    options = {"temperature": temperature, "weighting": "none"}
    assert_same(*chunked(given, **options), dense(given, **options), given.labels, rtol=1e-3, atol=1e-4)


def test_a_teacher_alone_can_need_a_shift():
    """All of its exponents are large, and the student's are next to nothing: sums and products must not overflow."""
    given = problem(seed=3)
    given.teacher_hidden, given.teacher_items = map(torch.ones_like, (given.teacher_hidden, given.teacher_items))
    given = at_exponents(given, 1.0, 0.5, walk._LARGEST_SUM_OF_EXPONENTS - 1)
    assert_same(*chunked(given), dense(given), given.labels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", [True, False])
def test_float16_holds_the_gradient_of_large_scores(teacher):
    given = at_exponents(problem(seed=4), 1.0, 30.0, 30.0)
    with torch.autocast("cpu", dtype=torch.float16):
        _, grads = chunked(given, teacher)
    for grad, value in zip(grads, dense(given, teacher).grads, strict=True):
        assert (grad - value).norm() < 1e-2 * value.norm()


def test_ranks_are_counted_before_rows_are_shifted():
    """Beside a thousand, float32 has no room for the difference of the other two."""
    items = torch.tensor([[0.0], [1000.0], [0.0], [1e-5]])
    assert distillation_loss(torch.ones(1, 1), items, torch.tensor([3])).student_ranks.tolist() == [2]


def test_the_true_items_own_score_is_not_rounded():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(torch.tensor([[1.003]]), torch.tensor([[0.0], [0.0], [-20.0]]), torch.tensor([2]))
    assert result.cross_entropy.item() == pytest.approx(20.06, rel=1e-5)


@pytest.mark.parametrize("teacher", [False, True])
def test_rounding_of_large_scores_changes_no_sum(teacher):
    """Those that bf16 rounds by up to 128 either way, whose power alone is beyond what float32 holds."""
    hidden = torch.linspace(40_000, 41_000, 50).unsqueeze(1).requires_grad_()
    items = torch.tensor([[0.0], [1.0], [0.0]], requires_grad=True)
    pair = (hidden.detach(), items.detach()) if teacher else ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(hidden, items, torch.ones(50).long(), *pair)
    assert result.cross_entropy == result.kl == 0 and result.agreement == float(teacher)
    assert all(grad.abs().max() < 1e-6 for grad in torch.autograd.grad(result.loss, (hidden, items)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_inputs_of_another_dtype_than_autocasts(dtype):
    hidden, items = torch.ones(2, 3, dtype=dtype), torch.ones(5, 3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(hidden, items, torch.tensor([1, 4]))
    assert result.cross_entropy.item() == pytest.approx(math.log(4), rel=1e-2)


def test_a_flat_list_at_a_low_temperature():
    """No item is listed: each exponent is the same, and far beyond what float32 holds without a shift."""
    given = problem(seed=3)
    count = len(given.labels)
    lists = ListedScores(torch.zeros(count, 1, dtype=torch.long), torch.zeros(count, 1))
    hidden = given.hidden.detach() * 1e-4
    result = distillation_loss(hidden, given.items.detach(), given.labels, teacher_lists=lists, temperature=0.02)
    assert result.kl.isfinite() and result.agreement > 0.9


def test_one_row_alone_can_need_a_shift():
    given = problem(seed=3, ignored=())
    given.hidden = given.hidden.detach() * 1e-3
    given.hidden[0] *= 4e4
    given.hidden.requires_grad_()
    result, grads = chunked(given, teacher=False)
    assert_same(result, grads, dense(given, teacher=False), given.labels, rtol=1e-4, atol=1e-4)


def test_rows_are_shifted_only_where_they_have_to_be(monkeypatch):
    seen, run = [], walk.Walk.run
    monkeypatch.setattr(walk.Walk, "run", lambda self: (seen.append(self.shifted), run(self)))
    chunked(problem())
    assert seen == [False]


def test_no_more_rows_are_held_than_there_are_positions():
    with LargestResult() as largest:
        chunked(problem(positions=8, num_items=200, ignored=()), chunk_size=1000)
    assert largest.elements == 8 * 200


def test_agreement_is_never_negative():
    for seed in range(100):
        torch.manual_seed(seed)
        hidden, items = torch.randn(1, 4) * 8, torch.randn(31, 4) * 4
        assert distillation_loss(hidden, items, torch.tensor([1]), -hidden, items).agreement >= 0


def test_a_block_is_one_item_at_least(monkeypatch):
    monkeypatch.setattr(walk, "_GRADIENT_BLOCK_BYTES", 1)
    monkeypatch.setattr(walk, "_SCORE_BLOCK_ITEMS", 0)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert chunked(problem())[0].loss.isfinite()


def test_each_thread_has_a_slice(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert default_slice_size(100, "cpu") == 3 * (512 << 10) // 400
    assert default_slice_size(100, "cuda") == (256 << 20) // 400


def test_default_chunk_size():
    assert default_chunk_size(12_000, "cpu") == (8 << 20) // 48_000
    assert default_chunk_size(12_000, "cpu", torch.bfloat16) == (8 << 20) // 24_000
    assert default_chunk_size(10_000_000, "cpu") == 64
    assert default_chunk_size(12_000, "cuda") > default_chunk_size(12_000, torch.device("cpu"))
