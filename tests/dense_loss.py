# SPDX-License-Identifier: Apache-2.0
"""The distillation loss by its definition, with plain autograd on the whole score matrix, in double precision."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmd4rec_hf.distillation import DistillationLoss, distillation_loss


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
    result.teacher_ranks = None
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
    for name in ("student_ranks", "teacher_ranks"):
        ranks, value = getattr(actual, name), getattr(expected, name)
        if value is None:
            assert ranks is None
        else:
            assert ranks[labels != -100].tolist() == value
            assert (ranks[labels == -100] == 0).all()


def assert_identical(first, second):
    """Two results of `chunked`, to the last bit."""
    for field in fields(DistillationLoss):
        ours, theirs = getattr(first[0], field.name), getattr(second[0], field.name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs), field.name
    for ours, theirs in zip(first[1], second[1], strict=True):
        assert torch.equal(ours, theirs)


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
