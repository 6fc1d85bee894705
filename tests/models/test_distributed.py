# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from llmd4rec_hf import distillation_loss
from llmd4rec_hf.models.recommender import supervised


@pytest.fixture
def one_process(tmp_path):
    """A group of one: everything that watches over parameters is there."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_every_parameter_is_ready_once(one_process, make_model, batch, kind):
    """With the loss outside the model, as trainers have it: the item matrix, often a parameter, is an output."""
    model = make_model(kind)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    for _ in range(2):
        outputs = parallel(batch["item_ids"], batch["attention_mask"])
        hidden, item_matrix, labels = supervised(outputs.hidden, batch["labels"], outputs.item_matrix)
        distillation_loss(hidden, item_matrix, labels).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for _ in range(2):
        model(**batch).loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, msg=name)
