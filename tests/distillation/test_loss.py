# SPDX-License-Identifier: Apache-2.0
"""The chunked loss against plain autograd on the whole score matrix, in double precision."""

from __future__ import annotations

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llmd4rec_hf.distillation import DistillationLoss, ListedScores, distillation_loss, walk
from llmd4rec_hf.distillation.walk import default_chunk_size
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.evaluation import target_ranks


WEIGHTINGS = ("rank", "confidence", "none")
P, N, D, D_TEACHER = 11, 17, 5, 3


def problem(seed=0, positions=P, num_items=N, ignored=(2, 7), scale=1.0):
    """Inputs as leaves of double precision, so that the oracle is finer than what it checks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        # Values that bfloat16 holds exactly: every precision gets the very same inputs.
        return (scale * torch.randn(*shape, generator=generator)).bfloat16().double()

    labels = torch.randint(1, num_items + 1, (positions,), generator=generator)
    labels[[index for index in ignored if index < positions]] = -100
    return SimpleNamespace(
        hidden=draw(positions, D).requires_grad_(),
        items=draw(num_items + 1, D).requires_grad_(),
        labels=labels,
        teacher_hidden=draw(positions, D_TEACHER),
        teacher_items=draw(num_items + 1, D_TEACHER),
    )


def weight_by_definition(weighting, base, student_rank, teacher_rank, student_log_p, teacher_log_p):
    if weighting == "none":
        return 1.0
    if weighting == "confidence":  # 2 p_t / (p_t + p_s), where the probabilities may be too small for a float
        return 2 * torch.tensor([student_log_p, teacher_log_p]).softmax(dim=0)[1].item()
    s, t = student_rank + base - 1, teacher_rank + base - 1
    weight = 1 + (s - t) / max(t, 1) if s > t else 1 - (t - s) / max(s, 1)
    return min(max(weight, 0.0), 2.0)


def ranks_by_definition(scores, targets):
    return [
        1 + int((row > row[y]).sum()) + int((row == row[y]).sum()) - 1 for row, y in zip(scores, targets, strict=True)
    ]


def dense(
    given,
    teacher=True,
    *,
    temperature=1.0,
    kl_weight=1.0,
    weighting="rank",
    rank_base=1,
    scale_by_temperature_squared=True,
    divisor=None,
):
    """All parts and, in `.grads`, the gradients for hidden and items, by `cross_entropy` and `kl_div`."""
    hidden, items = (tensor.detach().double().requires_grad_() for tensor in (given.hidden, given.items))
    keep = given.labels != -100
    targets = given.labels[keep] - 1
    count = max(len(targets), 1)
    divisor = divisor or count
    scores = (hidden @ items.T)[keep, 1:]
    cross_entropy = F.cross_entropy(scores, targets, reduction="sum") / divisor
    result = SimpleNamespace(
        cross_entropy=cross_entropy, kl=torch.zeros(()), weight_mean=torch.zeros(()), agreement=torch.zeros(())
    )
    result.student_ranks = ranks_by_definition(scores, targets)
    if teacher:
        teacher_scores = (given.teacher_hidden.double() @ given.teacher_items.double().T)[keep, 1:]
        result.teacher_ranks = ranks_by_definition(teacher_scores, targets)
        log_q = F.log_softmax(scores / temperature, dim=1)
        log_p = F.log_softmax(teacher_scores / temperature, dim=1)
        q, p = (log.detach().gather(1, targets[:, None])[:, 0].tolist() for log in (log_q, log_p))
        weights = torch.tensor(
            [
                weight_by_definition(weighting, rank_base, *row)
                for row in zip(result.student_ranks, result.teacher_ranks, q, p, strict=True)
            ],
            dtype=torch.float64,
        )
        kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
        result.kl = (weights * kl).sum() / divisor * (temperature**2 if scale_by_temperature_squared else 1.0)
        result.weight_mean = weights.sum() / count
        result.agreement = torch.minimum(log_q.exp(), log_p.exp()).sum() / count
    result.loss = result.cross_entropy + kl_weight * result.kl
    result.grads = torch.autograd.grad(result.loss, (hidden, items))
    return result


def chunked(given, teacher=True, dtype=torch.float32, **options):
    hidden, items = (tensor.detach().to(dtype).requires_grad_() for tensor in (given.hidden, given.items))
    pair = (given.teacher_hidden.to(dtype), given.teacher_items.to(dtype)) if teacher else ()
    result = distillation_loss(hidden, items, given.labels, *pair, **options)
    grads = torch.autograd.grad(result.loss, (hidden, items))
    assert [grad.dtype for grad in grads] == [dtype, dtype]
    return result, grads


def assert_same(actual, grads, expected, labels, rtol=2e-5, atol=2e-6):
    for name in ("loss", "cross_entropy", "kl", "weight_mean", "agreement"):
        value = getattr(expected, name).detach().float()
        torch.testing.assert_close(getattr(actual, name).detach(), value, rtol=rtol, atol=atol, msg=name)
    for grad, value in zip(grads, expected.grads, strict=True):
        torch.testing.assert_close(grad, value.float(), rtol=rtol, atol=atol)
    assert actual.student_ranks[labels != -100].tolist() == expected.student_ranks
    assert (actual.student_ranks[labels == -100] == 0).all()


def assert_identical(first, second):
    """Two results of `chunked`, to the last bit."""
    for field in fields(DistillationLoss):
        ours, theirs = getattr(first[0], field.name), getattr(second[0], field.name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), field.name
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert torch.equal(ours, theirs)


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
    assert actual.teacher_ranks is None
    assert actual.loss.item() == actual.cross_entropy.item()


@pytest.mark.parametrize("chunk_size", [1, 3, P, P + 5, None])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_with_a_teacher(temperature, weighting, chunk_size):
    given = problem(seed=1)
    options = {"temperature": temperature, "weighting": weighting, "kl_weight": 0.7}
    actual, grads = chunked(given, chunk_size=chunk_size, **options)
    expected = dense(given, **options)
    assert_same(actual, grads, expected, given.labels)
    assert actual.teacher_ranks[given.labels != -100].tolist() == expected.teacher_ranks
    assert (actual.teacher_ranks[given.labels == -100] == 0).all()


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
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.student_ranks, expected.student_ranks)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, value.to(dtype))
    # And so within half a unit in the last place of what is right.
    for grad, value in zip(grads, dense(given, temperature=2.0).grads, strict=True):
        torch.testing.assert_close(grad.double(), value, rtol=torch.finfo(dtype).eps, atol=1e-6)


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
    """In bfloat16 all of these scores are 1: the best item would rank last, and the last one no lower."""
    items = torch.cat([torch.zeros(1), 1 + torch.arange(8) * 1e-4])[:, None]
    labels = torch.arange(1, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(torch.ones(8, 1), items, labels)
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


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch):
    """Most of the work is the gradients'; an evaluation must not pay for them."""
    products = []
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *_, **__: products.append("item matrix"))
    given = problem()
    with torch.no_grad():
        result = distillation_loss(given.hidden, given.items, given.labels)
    assert not products
    assert not result.loss.requires_grad
    distillation_loss(given.hidden, given.items, given.labels)
    assert products


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
    # Whole numbers: many ties.
    given.hidden, given.items = given.hidden.detach().round(), given.items.detach().round()
    given.teacher_hidden, given.teacher_items = given.teacher_hidden.round(), given.teacher_items.round()
    actual, _ = chunked(given, teacher, chunk_size=7)
    assert torch.equal(actual.student_ranks, target_ranks(given.hidden.float(), given.items.float(), given.labels))
    if teacher:
        expected = target_ranks(given.teacher_hidden.float(), given.teacher_items.float(), given.labels)
        assert torch.equal(actual.teacher_ranks, expected)


class LargestResult(TorchDispatchMode):
    """Size in elements of the largest tensor that any operation gives back."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


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
        monkeypatch.setattr(walk, "_SCORE_BLOCK_BYTES", 3 * 4 * D)  # three items
        monkeypatch.setattr(walk, "_GRADIENT_BLOCK_BYTES", 5 * 4 * D)  # five
        actual, grads = chunked(given, teacher, temperature=temperature, chunk_size=5)
    rounding = {"rtol": 2e-2, "atol": 2e-3} if precision == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(grads, expected_grads, **rounding)
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.agreement, expected.agreement)
    assert torch.equal(actual.student_ranks, expected.student_ranks)


def test_default_chunk_size():
    assert default_chunk_size(12_000, "cpu") == (12 << 20) // 48_000
    assert default_chunk_size(10_000_000, "cpu") == 64
    assert default_chunk_size(12_000, "cuda") > default_chunk_size(12_000, torch.device("cpu"))


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
        (
            {"teacher_item_matrix": torch.zeros(6, 4)},
            "The teacher scores 5 items and the student 4.*same item vocabulary",
        ),
        ({"teacher_hidden": torch.zeros(2, 4)}, r"teacher_hidden must be of shape \(3, 4\), got \(2, 4\)"),
        ({"teacher_hidden": torch.zeros(3, 2)}, r"teacher_hidden must be of shape \(3, 4\)"),
        ({"teacher_hidden": None}, "give both or neither"),
        ({"teacher_item_matrix": None}, "give both or neither"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
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


# --- teachers that list their best items -----------------------------------------------------------------------------


def with_lists(given, size):
    """
    The problem with, as `lists`, the best items of its teacher. For the oracle the teacher becomes the distribution
    that those stand for, written out: its hidden states are log-probabilities, its item matrix is the identity.
    """
    num_items = len(given.items) - 1
    log_probs = (given.teacher_hidden @ given.teacher_items[1:].T).log_softmax(dim=1)
    best = log_probs.topk(size, dim=1)
    mass = (1 - best.values.exp().sum(dim=1, keepdim=True)).clamp_min(0)
    spread = (mass / max(num_items - size, 1)).log().clamp_min(-1e30).expand(-1, num_items)
    dense_scores = spread.scatter(1, best.indices, best.values)
    given.lists = ListedScores(best.indices + 1, best.values.float())
    given.teacher_hidden = dense_scores
    given.teacher_items = torch.cat([torch.zeros(1, num_items), torch.eye(num_items)]).double()
    return given


def by_lists(given, **options):
    hidden, items = (tensor.detach().float().requires_grad_() for tensor in (given.hidden, given.items))
    result = distillation_loss(hidden, items, given.labels, teacher_lists=given.lists, **options)
    return result, torch.autograd.grad(result.loss, (hidden, items))


def test_a_list_by_hand():
    """
    Three items. The teacher gives the first one half, and so a quarter to each of the others; the student gives a
    third to all: KL = 1/2 log 3/2 + 1/2 log 3/4. Both rank the second item last, since ties count against it.
    """
    lists = ListedScores(torch.tensor([[1]]), torch.tensor([[0.5]]).log())
    result = distillation_loss(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]), teacher_lists=lists)
    assert result.kl.item() == pytest.approx(0.5 * math.log(9 / 8))
    assert result.agreement.item() == pytest.approx(5 / 6)
    assert (result.student_ranks.item(), result.teacher_ranks.item(), result.weight_mean.item()) == (3, 3, 1)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5, 3.0])
@pytest.mark.parametrize("size", [1, 5])
def test_lists_are_the_distribution_they_stand_for(size, temperature, weighting, chunk_size):
    given = with_lists(problem(seed=1), size)
    options = {"temperature": temperature, "weighting": weighting, "kl_weight": 0.7}
    actual, grads = by_lists(given, chunk_size=chunk_size, **options)
    expected = dense(given, **options)
    assert_same(actual, grads, expected, given.labels, rtol=1e-5, atol=1e-5)
    assert actual.teacher_ranks[given.labels != -100].tolist() == expected.teacher_ranks
    assert (actual.teacher_ranks[given.labels == -100] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_lists_of_all_items_are_the_teacher(temperature):
    given = problem(seed=2)
    expected = chunked(given, temperature=temperature)
    actual = by_lists(with_lists(given, N), temperature=temperature)
    for field in fields(DistillationLoss):
        torch.testing.assert_close(getattr(actual[0], field.name), getattr(expected[0], field.name))
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(1, 9),
    num_items=st.integers(1, 12),
    share=st.floats(0, 1),
    temperature=st.floats(0.3, 4),
    weighting=st.sampled_from(WEIGHTINGS),
)
def test_any_lists(seed, positions, num_items, share, temperature, weighting):
    size = max(1, round(share * num_items))
    given = with_lists(problem(seed, positions, num_items, ignored=()), size)
    options = {"temperature": temperature, "weighting": weighting}
    actual, grads = by_lists(given, **options)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert actual.kl.item() >= -1e-5
    assert 0 <= actual.agreement.item() <= 1 + 1e-6
    # The logarithm of a small rest is rounded less finely in single precision than in the oracle's double.
    if (given.teacher_hidden.amin(dim=1) > math.log(1e-4)).all() or size == num_items:
        assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 10.0])
def test_lists_that_leave_nothing_over(temperature, weighting):
    """The true item has the probability 0 at the first position, and at the second the teacher is certain of it."""
    given = problem(seed=3, positions=2, ignored=())
    given.labels = torch.tensor([9, 4])
    given.lists = ListedScores(torch.tensor([[1, 2], [4, 0]]), torch.tensor([[0.75, 0.25], [1.0, 1.0]]).log())
    given.teacher_hidden = given.lists.dense(N).double()
    given.teacher_items = torch.cat([torch.zeros(1, N), torch.eye(N)]).double()
    options = {"temperature": temperature, "weighting": weighting}
    actual, grads = by_lists(given, **options)
    assert_same(actual, grads, dense(given, **options), given.labels, rtol=1e-5, atol=1e-5)
    assert actual.teacher_ranks.tolist() == [N, 1]


def test_an_item_that_is_not_listed_ranks_last_and_is_not_listened_to():
    """The student ranks the true item first: of a teacher that says nothing about it the rank weights take nothing."""
    items = torch.eye(9)[:, :8]
    lists = ListedScores(torch.tensor([[1, 2], [3, 2]]), torch.tensor([[0.4, 0.3], [0.4, 0.3]]).log())
    hidden = 2 * items[[3, 3]]
    result = distillation_loss(hidden, items, torch.tensor([3, 3]), teacher_lists=lists)
    assert result.student_ranks.tolist() == [1, 1]
    assert result.teacher_ranks.tolist() == [8, 1]
    assert result.weight_mean.item() == 0.5  # 0 and 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_hundred_of_two_thousand_items_are_close_to_all_of_them_and_would_not_be_if_renormalised(temperature):
    """A flat teacher, whose best hundred hold less than half of its probability."""
    given = problem(seed=4, positions=40, num_items=2000, scale=0.7, ignored=())
    options = {"temperature": temperature, "weighting": "none"}
    whole, (_, whole_gradient) = chunked(given, **options)
    lists = with_lists(given, 100).lists
    held = lists.log_probs.exp().sum(dim=1, keepdim=True)
    assert 0.1 < held.mean() < 0.6
    listed, (_, gradient) = by_lists(given, **options)
    given.lists = ListedScores(lists.ids, lists.log_probs - held.log())
    renormalised, (_, renormalised_gradient) = by_lists(given, **options)
    assert abs(listed.kl - whole.kl) < 0.2 * abs(renormalised.kl - whole.kl)
    assert (gradient - whole_gradient).norm() < 0.2 * (renormalised_gradient - whole_gradient).norm()


def test_lists_and_autocast():
    given = with_lists(problem(seed=5, positions=60, num_items=300, scale=0.7), 20)
    expected, expected_grads = by_lists(given, temperature=2.0, weighting="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, grads = by_lists(given, temperature=2.0, weighting="none")
    torch.testing.assert_close(actual.kl, expected.kl, rtol=2e-3, atol=2e-3)
    for grad, value in zip(grads, expected_grads, strict=True):
        assert (grad - value).norm() < 1e-2 * value.norm()


def test_positions_times_items_is_never_held_for_lists():
    given = with_lists(problem(positions=64, num_items=200), 10)
    with LargestResult() as largest:
        by_lists(given, chunk_size=8)
    assert largest.elements == 8 * 201 < 64 * 200


def test_lists_stay_as_they_are():
    given = with_lists(problem(), 4)
    ids, log_probs = given.lists.ids.clone(), given.lists.log_probs.clone()
    by_lists(given, temperature=2.0)
    assert torch.equal(given.lists.ids, ids) and torch.equal(given.lists.log_probs, log_probs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_lists": ListedScores(torch.ones(2, 3).long(), torch.zeros(2, 3))}, "must be 3, one per .* got 2"),
        ({"teacher_lists": ListedScores(torch.full((3, 1), 5), torch.zeros(3, 1))}, r"lists items 5\.\.5 .* 1\.\.4:"),
        ({"teacher_lists": ListedScores(torch.full((3, 1), -1), torch.zeros(3, 1))}, r"lists items -1\.\.-1"),
        ({"teacher_hidden": torch.zeros(3, 4), "teacher_item_matrix": torch.zeros(5, 4)}, "take the place of"),
    ],
)
def test_errors_of_lists(changes, message):
    arguments = {
        "hidden": torch.zeros(3, 2),
        "item_matrix": torch.zeros(5, 2),
        "labels": torch.tensor([1, 2, 4]),
        "teacher_lists": ListedScores(torch.tensor([[1], [4], [0]]), torch.full((3, 1), -1.0)),
    }
    distillation_loss(**arguments)
    with pytest.raises(ConfigurationError, match=message):
        distillation_loss(**arguments | changes)
