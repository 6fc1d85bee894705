# SPDX-License-Identifier: Apache-2.0
"""What an LLM recommender computes, written out: without a cache of the prefix, one history per row."""

from __future__ import annotations

import torch


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def soft_tokens(model, item_ids):
    tokens = model.input_projection(model.item_vectors[item_ids])
    if model.config.item_text:
        tokens = tokens + model.item_text_features[item_ids] @ model.input_text_projection.weight.T
    return tokens


def words(model, ids):
    return model.backbone.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))


def plain_encode(model, item_ids, attention_mask):
    """Prefix, items and (where it is read) suffix in one row each, without a cache."""
    if model.config.supervision == "all_positions":
        prefix = words(model, model.config.prefix_ids).expand(len(item_ids), -1, -1)
        inputs = torch.cat([prefix, soft_tokens(model, item_ids)], dim=1)
        return model.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, prefix.shape[1] :]
    rows = []
    for ids, length in zip(item_ids, attention_mask.sum(dim=1).tolist(), strict=True):
        states = []
        for end in range(1, length + 1):
            parts = [words(model, model.config.prefix_ids), soft_tokens(model, ids[:end])]
            inputs = torch.cat([*parts, words(model, model.config.suffix_ids)])
            states.append(model.backbone(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1])
        states += [torch.zeros_like(states[0])] * (len(ids) - length)
        rows.append(torch.stack(states))
    return torch.stack(rows)


def assert_is_the_plain_computation(model, batch):
    """Values and gradients of every trainable weight."""
    item_ids, mask = batch["item_ids"], batch["attention_mask"]
    keep = mask.bool()
    direction = torch.randn(1, generator=torch.Generator().manual_seed(1))
    results = []
    for encode in (model.encode, lambda *arguments: plain_encode(model, *arguments)):
        hidden = encode(item_ids, mask)[keep]
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden) * direction
        loss = (hidden * weights).sum() + hidden.square().mean()
        wanted = {name: value for name, value in trainable(model).items() if "head" not in name}
        results.append((hidden, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)))
    (hidden, grads), (expected, expected_grads) = results
    torch.testing.assert_close(hidden, expected, **CLOSE)
    for name, grad, value in zip(wanted, grads, expected_grads, strict=True):
        if grad is None:
            assert value is None or not value.any(), name
        else:
            scale = value.abs().max().item()
            torch.testing.assert_close(grad, value, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)
