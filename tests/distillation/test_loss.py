# SPDX-License-Identifier: Apache-2.0
"""The chunked loss against plain autograd on the whole score matrix, in double precision."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from dense_loss import WEIGHTINGS, P, assert_identical, assert_same, chunked, dense, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmd4rec_hf.distillation import distillation_loss
from llmd4rec_hf.distillation.weighting import WEIGHTINGS as WEIGHTING_FUNCTIONS
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.evaluation import target_ranks


pytestmark = pytest.mark.usefixtures("walk_by")


def test_by_hand():
    """Two items with scores 0 and log 3: probabilities 1/4 and 3/4; the teacher's are the other way round."""
    hidden, items = torch.tensor([[1.0]]), torch.tensor([[9.0], [0.0], [3.0]]).log1p()
    items[1:] = torch.tensor([[1.0], [3.0]]).log()
    teacher_items = items.clone()
    teacher_items[1:] = items[1:].flip(0)
    result = distillation_loss(hidden, items, torch.tensor([1]), hidden, teacher_items, kl_weight=0.5)
    third = torch.tensor(3.0).log().item()
    assert result.cross_entropy.item() == pytest.approx(torch.tensor(4.0).log().item())
    # KL = 3/4 log 3 - 1/4 log 3; the student ranks the item second and the teacher first: weight 2.
    assert result.kl.item() == pytest.approx(2 * 0.5 * third)
    assert result.weight_mean.item() == 2.0
    assert result.agreement.item() == pytest.approx(0.5)
    assert (result.student_ranks.tolist(), result.teacher_ranks.tolist()) == ([2], [1])
    assert result.loss.item() == pytest.approx(result.cross_entropy.item() + 0.5 * result.kl.item())


@pytest.mark.parametrize("chunk_size", [1, 3, P, P + 5, None])
def test_cross_entropy_alone(chunk_size):
    given = problem()
    actual, grads = chunked(given, teacher=False, chunk_size=chunk_size)
    assert_same(actual, grads, dense(given, teacher=False), given.labels)
    assert actual.loss.item() == actual.cross_entropy.item()


@pytest.mark.parametrize("chunk_size", [1, 3, P, P + 5, None])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_with_a_teacher(temperature, weighting, chunk_size):
    given = problem(seed=1)
    options = {"temperature": temperature, "weighting": weighting, "kl_weight": 0.7}
    actual, grads = chunked(given, chunk_size=chunk_size, **options)
    assert_same(actual, grads, dense(given, **options), given.labels)


@pytest.mark.parametrize("scale_by_temperature_squared", [True, False])
@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("rank_base", [0, 1])
def test_rank_base_and_squared_temperature(rank_base, temperature, scale_by_temperature_squared):
    given = problem(seed=2)
    options = {
        "rank_base": rank_base,
        "temperature": temperature,
        "scale_by_temperature_squared": scale_by_temperature_squared,
        "kl_weight": 3.0,
    }
    assert_same(*chunked(given, **options), dense(given, **options), given.labels)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 9),
    num_items=st.integers(1, 12),
    chunk_size=st.integers(1, 10),
    temperature=st.floats(0.3, 4),
    kl_weight=st.floats(0, 3),
    weighting=st.sampled_from(WEIGHTINGS),
    ignored=st.sets(st.integers(0, 8)),
)
def test_any_problem(seed, positions, num_items, chunk_size, temperature, kl_weight, weighting, ignored):
    given = problem(seed, positions, num_items, tuple(ignored))
    options = {"temperature": temperature, "kl_weight": kl_weight, "weighting": weighting}
    actual, grads = chunked(given, chunk_size=chunk_size, **options)
    assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-4, atol=1e-5)
    assert actual.loss.item() == pytest.approx(actual.cross_entropy.item() + kl_weight * actual.kl.item(), rel=1e-6)
    assert actual.kl.item() >= -1e-5
    assert 0 <= actual.weight_mean.item() <= 2
    assert 0 <= actual.agreement.item() <= 1 + 1e-6


@pytest.mark.parametrize("teacher", [True, False])
def test_whatever_the_defaults_of_new_tensors_are(teacher):
    given = problem()
    expected = chunked(given, teacher)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            actual = chunked(given, teacher)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_identical(actual, expected)


@pytest.mark.parametrize("teacher", [True, False])
def test_all_positions_ignored(teacher):
    given = problem()
    given.labels[:] = -100
    actual, grads = chunked(given, teacher)
    parts = (actual.loss, actual.cross_entropy, actual.kl, actual.weight_mean, actual.agreement)
    assert all(part.item() == 0 for part in parts)
    assert all((grad == 0).all() for grad in grads)
    assert actual.student_ranks.tolist() == [0] * P


def test_no_positions():
    given = problem(positions=0, ignored=())
    actual, grads = chunked(given)
    assert actual.loss.item() == 0
    assert (grads[1] == 0).all()


def test_ignored_positions_are_as_if_absent():
    given = problem(seed=3)
    keep = given.labels != -100
    fewer = SimpleNamespace(**vars(given))
    fewer.labels, fewer.hidden, fewer.teacher_hidden = (
        given.labels[keep],
        given.hidden[keep],
        given.teacher_hidden[keep],
    )
    (actual, grads), (expected, expected_grads) = chunked(given), chunked(fewer)
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(grads[0][keep], expected_grads[0])
    assert (grads[0][~keep] == 0).all()
    assert torch.equal(grads[1], expected_grads[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    """Everything inside is float32, so that only the gradients are rounded, once, at the end."""
    given = problem(seed=4)
    options = {"temperature": 2.0, "chunk_size": 4}
    (actual, grads), (expected, expected_grads) = chunked(given, dtype=dtype, **options), chunked(given, **options)
    assert actual.loss.dtype == torch.float32
    # Not bit for bit: on some processors the last bit of a product depends on where its operands lie in memory.
    torch.testing.assert_close(actual.loss, expected.loss)
    assert torch.equal(actual.student_ranks, expected.student_ranks)
    half_a_unit = 0.501 * torch.finfo(dtype).eps
    for grad, value in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.float(), value, rtol=half_a_unit, atol=1e-7)
    for grad, value in zip(grads, dense(given, temperature=2.0).grads, strict=True):
        torch.testing.assert_close(grad.double(), value, rtol=half_a_unit, atol=1e-6)


def test_mixed_precisions():
    """As under mixed-precision training: half-precision states, a float32 item matrix, a float32 teacher."""
    given = problem(seed=4)
    hidden, items = given.hidden.detach().bfloat16().requires_grad_(), given.items.detach().float().requires_grad_()
    loss = distillation_loss(
        hidden, items, given.labels, given.teacher_hidden.float(), given.teacher_items.float()
    ).loss
    loss.backward()
    expected, (_, expected_items) = chunked(given)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(items.grad, expected_items)
    assert hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_autocast_rounds_matrix_products_alone(temperature):
    given = problem(seed=5, positions=60, num_items=500, scale=0.7)
    options = {"temperature": temperature, "weighting": "none"}
    expected, expected_grads = chunked(given, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, grads = chunked(given, **options)
    for name in ("loss", "cross_entropy", "kl", "agreement"):
        value = getattr(actual, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(expected, name), rtol=2e-3, atol=2e-3)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert (grad - value).norm() < 1e-2 * value.norm()


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_gradients_of_autocast_are_right_to_a_hundredth(temperature, dtype, teacher):
    """Summed over many chunks, and for a student that has learned: its gradients are small differences."""
    given = problem(seed=13, positions=300, num_items=400)
    given.hidden = given.hidden.detach()
    kept = given.labels != -100
    given.hidden[kept] += 2 * given.items.detach()[given.labels[kept]]
    options = {"temperature": temperature, "weighting": "confidence"}
    expected = dense(given, teacher, **options)
    with torch.autocast("cpu", dtype=dtype):
        _, grads = chunked(given, teacher, chunk_size=16, **options)
    for grad, value in zip(grads, expected.grads, strict=True):
        assert (grad - value).norm() < 1e-2 * value.norm()


def test_autocast_does_not_tie_the_true_item_with_others():
    """In bfloat16 these scores are all the same: the best item would rank last, and the last one no lower."""
    items = torch.cat([torch.zeros(1), 1 + torch.arange(8) * 1e-4])[:, None]
    labels = torch.arange(1, 9)
    # With this hidden state every exponent to the base 2 is the item itself, so that items alone are rounded.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(torch.full((8, 1), math.log(2)), items, labels)
    assert result.student_ranks[-1].item() == 1
    assert result.student_ranks.float().mean().item() < 8


def test_autocast_without_a_difference_has_no_divergence():
    given = problem(seed=5)
    given.teacher_hidden, given.teacher_items = given.hidden.detach(), given.items.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = chunked(given, temperature=2.0)
    assert result.kl.item() == pytest.approx(0, abs=1e-6)
    assert result.weight_mean.item() == 1.0


@pytest.mark.parametrize("number", [40, 40.0, torch.tensor(40), torch.tensor(40.0)], ids=repr)
def test_num_items_in_batch(number):
    given = problem(seed=6)
    actual, grads = chunked(given, num_items_in_batch=number)
    assert_same(actual, grads, dense(given, divisor=40), given.labels)


def test_gradient_accumulation_adds_up():
    given = problem(seed=7)
    whole, whole_grads = chunked(given, num_items_in_batch=9, temperature=2.0)
    hidden, items = (tensor.detach().float().requires_grad_() for tensor in (given.hidden, given.items))
    total = 0.0
    for part in (slice(0, 4), slice(4, P)):
        teacher_hidden, teacher_items = given.teacher_hidden[part].float(), given.teacher_items.float()
        loss = distillation_loss(
            hidden[part],
            items,
            given.labels[part],
            teacher_hidden,
            teacher_items,
            num_items_in_batch=9,
            temperature=2.0,
        ).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close((hidden.grad, items.grad), whole_grads)


def test_the_backward_pass_scales_and_repeats():
    given = problem()
    hidden, items = (tensor.detach().float().requires_grad_() for tensor in (given.hidden, given.items))
    loss = distillation_loss(hidden, items, given.labels).loss
    once = torch.autograd.grad(loss, (hidden, items), retain_graph=True)
    scaled = torch.autograd.grad(3 * loss, (hidden, items))
    torch.testing.assert_close(scaled, tuple(3 * grad for grad in once))


def test_a_gradient_that_was_given_out_may_be_changed():
    """Optimizers clip gradients in place; a second backward pass over the same graph must not see that."""
    given = problem()
    hidden, items = (tensor.detach().float().requires_grad_() for tensor in (given.hidden, given.items))
    loss = distillation_loss(hidden, items, given.labels).loss
    once = torch.autograd.grad(loss, (hidden, items), retain_graph=True)
    before = [grad.clone() for grad in once]
    for grad in once:
        grad.zero_()
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, (hidden, items)), before, strict=True))


@pytest.mark.parametrize("needed", ["hidden", "items"])
def test_gradients_of_one_input_alone(needed):
    given = problem()
    _, expected = chunked(given)
    hidden, items = given.hidden.detach().float(), given.items.detach().float()
    leaf, value = (hidden, expected[0]) if needed == "hidden" else (items, expected[1])
    leaf.requires_grad_()
    distillation_loss(
        hidden, items, given.labels, given.teacher_hidden.float(), given.teacher_items.float()
    ).loss.backward()
    assert torch.equal(leaf.grad, value)


@pytest.mark.parametrize("row", [1e4, -1e4, 1e30, float("inf"), float("nan")])
def test_the_padding_row_never_matters(row):
    given = problem(seed=8)
    expected = chunked(given, temperature=2.0)
    given.items = given.items.detach().clone()
    given.items[0] = given.teacher_items[0] = row
    actual = chunked(given, temperature=2.0)
    assert_identical(actual, expected)
    assert (actual[1][1][0] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_extreme_scores_stay_finite(weighting, temperature):
    given = problem(seed=9)
    largest = (given.hidden @ given.items.T).abs().max().item()
    given.hidden = given.hidden.detach() * 1e4 / largest
    given.teacher_hidden = given.teacher_hidden * 1e4 / (given.teacher_hidden @ given.teacher_items.T).abs().max()
    options = {"temperature": temperature, "weighting": weighting}
    actual, grads = chunked(given, **options)
    expected = dense(given, **options)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert 1e3 < actual.loss.item() < 1e6
    for name in ("loss", "cross_entropy", "kl"):
        torch.testing.assert_close(getattr(actual, name).item(), getattr(expected, name).item(), rtol=1e-4, atol=1e-2)


def test_a_teacher_that_agrees_changes_nothing():
    given = problem(seed=10)
    given.teacher_hidden, given.teacher_items = given.hidden.detach(), given.items.detach()
    actual, grads = chunked(given, temperature=2.0)
    alone, alone_grads = chunked(given, teacher=False)
    assert actual.kl.item() == pytest.approx(0, abs=1e-6)
    assert actual.agreement.item() == pytest.approx(1)
    assert actual.weight_mean.item() == 1.0
    torch.testing.assert_close(grads, alone_grads)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_without_weight_changes_nothing(temperature):
    """Not even a bit: Adam makes steps of full size out of what rounding leaves of a gradient that should be zero."""
    given = problem(seed=10)
    actual, grads = chunked(given, temperature=temperature, kl_weight=0.0)
    alone, alone_grads = chunked(given, teacher=False)
    assert torch.equal(actual.loss, alone.loss)
    assert all(torch.equal(*pair) for pair in zip(grads, alone_grads, strict=True))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_temperature_and_weighting_change_the_loss(weighting):
    given = problem(seed=11)
    values = [chunked(given, temperature=t, weighting=weighting)[0].loss.item() for t in (0.5, 1.0, 2.0)]
    others = [chunked(given, weighting=other)[0].loss.item() for other in WEIGHTINGS if other != weighting]
    assert len({round(value, 4) for value in values + others}) == 5


def test_the_teacher_gets_no_gradient():
    given = problem()
    teacher_hidden, teacher_items = given.teacher_hidden.requires_grad_(), given.teacher_items.requires_grad_()
    result = distillation_loss(given.hidden, given.items, given.labels, teacher_hidden, teacher_items)
    result.loss.backward()
    assert teacher_hidden.grad is None and teacher_items.grad is None
    assert given.hidden.grad is not None


def test_only_the_loss_carries_a_gradient():
    given = problem()
    result = distillation_loss(given.hidden, given.items, given.labels, given.teacher_hidden, given.teacher_items)
    carrying = [field.name for field in fields(result) if getattr(getattr(result, field.name), "requires_grad", False)]
    assert carrying == ["loss"]


def test_no_gradient_is_computed_where_none_is_wanted():
    """Most of the work is the gradients'; an evaluation must not pay for them."""
    given = problem(ignored=())
    product = 2 * given.hidden.shape[0] * (given.items.shape[0] - 1) * given.hidden.shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = distillation_loss(given.hidden, given.items, given.labels)
    assert counter.get_total_flops() == product
    assert not result.loss.requires_grad
    with FlopCounterMode(display=False) as counter:
        distillation_loss(given.hidden, given.items, given.labels)
    assert counter.get_total_flops() > product


def test_the_inputs_stay_as_they_are():
    given = problem()
    before = [tensor.detach().clone() for tensor in vars(given).values()]
    inputs = [tensor.detach().float() for tensor in (given.teacher_hidden, given.teacher_items)]
    hidden, items = given.hidden.detach().float().requires_grad_(), given.items.detach().float().requires_grad_()
    distillation_loss(hidden, items, given.labels, *inputs, temperature=2.0).loss.backward()
    for tensor, value in zip((hidden, items, given.labels, *inputs), before, strict=True):
        torch.testing.assert_close(tensor.detach().double(), value.double(), rtol=0, atol=0)


@pytest.mark.parametrize("teacher", [True, False])
def test_ranks_are_those_of_the_evaluation(teacher):
    given = problem(seed=12, positions=40, num_items=9, ignored=())
    # Scores are small whole numbers times 1 or 2: many ties, and they stay ties whatever hidden states are scaled by.
    random = torch.Generator().manual_seed(12)

    def axes(width):
        items = torch.eye(width)[torch.randint(width, (10,), generator=random)]
        return items.double() * torch.randint(1, 3, (10, 1), generator=random)

    given.hidden, given.items = given.hidden.detach().round(), axes(given.items.shape[1])
    given.teacher_hidden, given.teacher_items = given.teacher_hidden.round(), axes(given.teacher_items.shape[1])
    actual, _ = chunked(given, teacher, chunk_size=7)
    assert torch.equal(actual.student_ranks, target_ranks(given.hidden.float(), given.items.float(), given.labels))
    if teacher:
        expected = target_ranks(given.teacher_hidden.float(), given.teacher_items.float(), given.labels)
        assert torch.equal(actual.teacher_ranks, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_without_ranks_all_else_is_the_same(weighting):
    given = problem(seed=9)
    expected, expected_grads = chunked(given, weighting=weighting)
    actual, grads = chunked(given, weighting=weighting, count_ranks=False)
    # Rank weights cannot do without.
    for ranks in (actual.student_ranks, actual.teacher_ranks):
        assert (ranks is None) == (weighting != "rank")
    for name in ("loss", "cross_entropy", "kl", "weight_mean", "agreement"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert all(torch.equal(grad, value) for grad, value in zip(grads, expected_grads, strict=True))
    without_teacher, _ = chunked(given, teacher=False, count_ranks=False)
    assert without_teacher.student_ranks is None


def test_a_weighting_of_ones_own_gets_ranks(monkeypatch):
    seen = []

    def listen(student, teacher):
        seen.append(student.ranks)
        return (teacher.ranks < student.ranks).float()

    monkeypatch.setitem(WEIGHTING_FUNCTIONS, "own", listen)
    result, _ = chunked(problem(seed=9, ignored=()), weighting="own", count_ranks=False)
    assert torch.equal(torch.cat(seen), result.student_ranks)


@pytest.mark.parametrize(
    ("weights", "mean"),
    [
        (lambda ranks: ranks.double() / ranks, 1.0),
        (lambda ranks: torch.full(ranks.shape, 0.5, dtype=torch.bfloat16), 0.5),
        (lambda ranks: torch.tensor(0.5), 0.5),
        (lambda ranks: ranks > 0, 1.0),
    ],
)
def test_what_a_weighting_of_ones_own_may_take_and_give(monkeypatch, weights, mean):
    def own(student, teacher):
        (ranks, log_probs), (_, teacher_log_probs) = student, teacher
        assert ranks.dtype == torch.long and (log_probs + teacher_log_probs < 0).all()
        return weights(ranks)

    monkeypatch.setitem(WEIGHTING_FUNCTIONS, "own", own)
    result, _ = chunked(problem(seed=9, ignored=()), weighting="own")
    assert {result.loss.dtype, result.kl.dtype, result.weight_mean.dtype} == {torch.float32}
    assert result.weight_mean.item() == pytest.approx(mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([1, 2, 0])}, r"labels must be in 1\.\.4 .*got 0\.\.2"),
        ({"labels": torch.tensor([1, 5, 2])}, r"labels must be in 1\.\.4 .*got 1\.\.5"),
        ({"labels": torch.tensor([1, -1, 2])}, r"got -1\.\.2"),
        ({"labels": torch.tensor([1, 2])}, r"labels must be of shape \(3,\), got \(2,\)"),
        ({"hidden": torch.zeros(3, 3)}, r"hidden must be \(P, d\)"),
        ({"hidden": torch.zeros(1, 3, 2)}, r"hidden must be \(P, d\)"),
        ({"item_matrix": torch.zeros(5)}, r"hidden must be \(P, d\)"),
        ({"item_matrix": torch.zeros(1, 2)}, "item_matrix holds no item"),
        (
            {"teacher_item_matrix": torch.zeros(6, 4)},
            "The teacher scores 5 items and the student 4.*same item vocabulary",
        ),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden must be of shape \(3, 4\), got \(2, 4\)"),
        ({"teacher_hidden": torch.zeros(3, 2)}, r"teacher_hidden must be of shape \(3, 4\)"),
        ({"teacher_hidden": None}, "give both or neither"),
        ({"teacher_item_matrix": None}, "give both or neither"),
        ({"temperature": 0}, "temperature must be positive and finite, got 0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"chunk_size": -1}, "chunk_size must be at least 1, or left out, got -1"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"weighting": "ranks"}, "weighting must be one of rank, confidence, none.*, got 'ranks'"),
        ({"rank_base": 2}, "rank_base must be 0 or 1"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "hidden": torch.zeros(3, 2),
        "item_matrix": torch.zeros(5, 2),
        "labels": torch.tensor([1, 2, 4]),
        "teacher_hidden": torch.zeros(3, 4),
        "teacher_item_matrix": torch.zeros(5, 4),
    }
    distillation_loss(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        distillation_loss(**arguments | changes)
