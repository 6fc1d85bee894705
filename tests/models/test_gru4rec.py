# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from llmd4rec_hf.models import GRU4RecConfig, GRU4RecModel


def make(**options):
    torch.manual_seed(0)
    return GRU4RecModel(GRU4RecConfig(num_items=9, hidden_size=4, **options))


def by_definition(model, ids):
    inputs = model.item_embedding.weight[ids]
    for number in range(model.config.num_layers):
        (w_r, w_z, w_n), (u_r, u_z, u_n) = (
            getattr(model.gru, f"weight_{kind}_l{number}").chunk(3) for kind in ("ih", "hh")
        )
        (b_r, b_z, b_n), (c_r, c_z, c_n) = (
            getattr(model.gru, f"bias_{kind}_l{number}").chunk(3) for kind in ("ih", "hh")
        )
        state, states = torch.zeros(4).to(inputs), []
        for x in inputs:
            reset = torch.sigmoid(w_r @ x + b_r + u_r @ state + c_r)
            update = torch.sigmoid(w_z @ x + b_z + u_z @ state + c_z)
            new = torch.tanh(w_n @ x + b_n + reset * (u_n @ state + c_n))
            state = (1 - update) * new + update * state
            states.append(state)
        inputs = torch.stack(states)
    return inputs @ model.output.weight.T + model.output.bias


@pytest.mark.parametrize("num_layers", [1, 2])
def test_by_definition(num_layers):
    model = make(num_layers=num_layers).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    ids = [3, 1, 9, 1]
    torch.testing.assert_close(model.encode(torch.tensor([ids]))[0], by_definition(model, ids))


def test_input_and_output_items_are_tied():
    model = make()
    assert model.item_matrix() is model.item_embedding.weight


def test_initial_weights():
    model = make()
    assert not model.item_matrix()[0].any()
    for name, parameter in model.gru.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(4))


def test_dropout_in_training_alone():
    model, ids = make(dropout=0.5), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.train().encode(ids), model.encode(ids))
    assert torch.equal(model.eval().encode(ids), model.encode(ids))
