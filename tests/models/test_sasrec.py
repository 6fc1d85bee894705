# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import GRU4RecConfig, GRU4RecModel, SASRecConfig, SASRecModel


def by_definition(model, ids):
    """Each position by itself, with attention written out over the items up to it."""
    size, heads = model.config.hidden_size, model.config.num_heads
    states = model.item_embedding.weight[ids] * math.sqrt(size) + model.position_embedding.weight[: len(ids)]
    for layer in model.layers:
        query = layer.query(layer.attention_norm(states))
        key, value = layer.key_value(states).split(size, dim=1)
        rows = []
        for position in range(len(ids)):
            mixed = []
            for part in torch.arange(size).chunk(heads):
                scores = key[: position + 1, part] @ query[position, part] / math.sqrt(size / heads)
                mixed.append(scores.softmax(dim=0) @ value[: position + 1, part])
            rows.append(torch.cat(mixed))
        states = layer.feed_forward_norm(states + layer.attention_output(torch.stack(rows)))
        first, _, _, second, _ = layer.feed_forward
        states = states + second(F.relu(first(states)))
    return F.layer_norm(states, (size,), model.final_norm.weight, model.final_norm.bias)


@pytest.mark.parametrize(("num_heads", "intermediate_size"), [(1, None), (2, 12), (4, 5)])
def test_by_definition(num_heads, intermediate_size):
    torch.manual_seed(0)
    config = SASRecConfig(
        num_items=9, hidden_size=8, num_heads=num_heads, intermediate_size=intermediate_size, max_length=5
    )
    model = SASRecModel(config).double().eval()
    for parameter in model.parameters():  # norms and biases too
        torch.nn.init.normal_(parameter)
    ids = [3, 1, 9, 1]
    torch.testing.assert_close(model.encode(torch.tensor([ids]))[0], by_definition(model, ids))
    assert model.layers[0].feed_forward[0].out_features == (intermediate_size or 8)


def test_input_and_output_items_are_tied():
    model = SASRecModel(SASRecConfig(num_items=9, hidden_size=8))
    assert model.item_matrix() is model.item_embedding.weight


def test_initial_weights():
    torch.manual_seed(0)
    model = SASRecModel(SASRecConfig(num_items=999, hidden_size=64))
    assert not model.item_matrix()[0].any()
    # Xavier: variance 2 / (rows + columns).
    assert model.item_matrix()[1:].std().item() == pytest.approx(math.sqrt(2 / 1064), rel=0.03)
    layer = model.layers[0]
    assert layer.attention_output.weight.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert not any(module.bias.any() for module in (layer.attention_output, layer.query, layer.key_value))


def test_defaults_are_the_papers():
    config = SASRecConfig(num_items=9)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.max_length) == (64, 2, 1, 50)


def test_dropout_in_training_alone():
    torch.manual_seed(0)
    model, ids = SASRecModel(SASRecConfig(num_items=9, hidden_size=8, dropout=0.5)), torch.tensor([[1, 2, 3]])
    assert not torch.equal(model.train().encode(ids), model.encode(ids))
    assert torch.equal(model.eval().encode(ids), model.encode(ids))


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigurationError, match=r"num_heads \(3\) must divide hidden_size \(8\)"):
        SASRecConfig(hidden_size=8, num_heads=3)


@pytest.mark.parametrize(("model", "config"), [(SASRecModel, SASRecConfig), (GRU4RecModel, GRU4RecConfig)])
def test_histories_that_are_too_long(model, config):
    model = model(config(num_items=9, hidden_size=8, max_length=3))
    model.encode(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ConfigurationError, match=r"histories of 4 items .* at most 3: .*max_length=3"):
        model.encode(torch.ones(2, 4, dtype=torch.long))
