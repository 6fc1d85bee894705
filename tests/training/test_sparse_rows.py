# SPDX-License-Identifier: Apache-2.0
"""Updates by rows against AdamW on the same gradients, dense."""

from __future__ import annotations

import copy

import pytest
import torch

from llmd4rec_hf.training.sparse_rows import RowAdamW, with_row_values


SETTINGS = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}


def parameters():
    random = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in ((6, 3), (4,))]


def give_gradients(ours, theirs, rows, step):
    """The same gradients to both, sparse and dense; a row may come twice."""
    random = torch.Generator().manual_seed(step)
    values, other = torch.randn(len(rows), 3, generator=random), torch.randn(4, generator=random)
    ours[0].grad = torch.sparse_coo_tensor(torch.tensor([rows]), values, (6, 3), check_invariants=True)
    theirs[0].grad = ours[0].grad.to_dense()
    ours[1].grad, theirs[1].grad = other, other.clone()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_with_a_gradient_for_every_row_it_is_adamw(decay):
    ours, theirs = parameters(), parameters()
    mine = RowAdamW([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": decay}], **SETTINGS)
    other = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": 0.0}, {"params": theirs[1:], "weight_decay": decay}], **SETTINGS
    )
    for step in range(4):
        give_gradients(ours, theirs, [5, 3, 1, 0, 2, 4, 3], step)
        mine.step()
        other.step()
        torch.testing.assert_close(ours, theirs)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(mine.state[ours[0]][key], other.state[theirs[0]][key])


def test_rows_without_a_gradient_keep_weights_and_moments():
    (table, bias), (same, _) = parameters(), parameters()
    optimizer, other = RowAdamW([table, bias], **SETTINGS), torch.optim.SparseAdam([same], **SETTINGS)
    for step, rows in enumerate([[0, 1, 2], [4, 2, 2], [2]]):
        before = copy.deepcopy((table.detach(), optimizer.state[table]))
        give_gradients([table, bias], [same, bias], rows, step)
        same.grad = table.grad
        optimizer.step()
        other.step()
        still = [row for row in range(6) if row not in rows]
        assert torch.equal(table[still], before[0][still])
        assert not torch.equal(table[rows], before[0][rows])
        for name in ("exp_avg", "exp_avg_sq"):
            moments = optimizer.state[table][name]
            torch.testing.assert_close(moments, other.state[same][name])
            if step:
                assert torch.equal(moments[still], before[1][name][still])
    assert table.grad.is_sparse


def test_a_row_of_zeros_is_a_row_without_a_gradient():
    with_zeros, without = parameters(), parameters()
    optimizers = [RowAdamW(ours, **SETTINGS) for ours in (with_zeros, without)]
    for step, rows in enumerate([[0, 1], [0, 2]]):
        give_gradients(without, with_zeros, rows, step)
        values = without[0].grad.coalesce().values()
        indices = torch.tensor([[*rows, 3 - 2 * step]])  # row 1 moved in the first step, and must not go on
        padded = torch.cat([values, torch.zeros(1, 3)])
        with_zeros[0].grad = torch.sparse_coo_tensor(indices, padded, (6, 3), check_invariants=True)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(with_zeros[0], without[0])


def test_its_state_goes_on_exactly():
    whole, cut = parameters(), parameters()
    optimizer, first = RowAdamW(whole, **SETTINGS), RowAdamW(cut, **SETTINGS)
    for step in range(4):
        if step == 2:
            state, first = copy.deepcopy(first.state_dict()), RowAdamW(cut)
            first.load_state_dict(state)
        give_gradients(whole, cut, [step, 5], step)
        cut[0].grad = whole[0].grad.clone()
        optimizer.step()
        first.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


def test_a_closure_is_called_once_and_its_loss_returned():
    table, bias = parameters()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        bias.grad = torch.ones(4)
        return 2.5

    assert RowAdamW([table, bias]).step(closure) == 2.5
    assert calls == [True]


@pytest.mark.parametrize("largest", [0.1, 100.0])
def test_clipping_sees_the_values_of_rows(largest):
    ours, theirs = parameters(), parameters()
    give_gradients(ours, theirs, [5, 3, 3], 0)
    norms = [
        torch.nn.utils.clip_grad_norm_(with_row_values(ours), largest),
        torch.nn.utils.clip_grad_norm_(theirs, largest),
    ]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close([p.grad.to_dense() for p in ours], [p.grad for p in theirs])
