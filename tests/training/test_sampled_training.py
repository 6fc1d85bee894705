# SPDX-License-Identifier: Apache-2.0
"""Training with `num_sampled_items`: the loss over a sample, the item matrix updated by rows."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from trained import losses, weights

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    GRU4RecConfig,
    GRU4RecModel,
    MutualDistillArguments,
    MutualDistillTrainer,
    SequenceCollator,
)
from llmd4rec_hf.distillation import draw_negatives, sampled_distillation_loss
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.training.sparse_rows import RowAdamW


@pytest.fixture
def arguments(make_arguments):
    return partial(make_arguments, per_device_train_batch_size=8, learning_rate=1e-2, num_sampled_items=5)


def train(model, args, splits, teacher=None, kind=CRMTrainer, **kwargs):
    trainer = kind(model, args, splits["train"], splits["validation"], teacher=teacher, **kwargs)
    trainer.train()
    return trainer


def test_one_step_equals_the_loss_written_out(make_crm, arguments, splits):
    """One SGD step of the trainer, rows and all, against the same step by hand on the whole matrix."""
    student, teacher = make_crm(0), make_crm(1, hidden_size=4)
    by_hand, before = copy.deepcopy(student), copy.deepcopy(student)
    args = arguments(
        max_steps=1, per_device_train_batch_size=40, max_grad_norm=0.3, loss_normalization="batch", seed=3
    )
    train(student, args, splits, teacher, optimizers=(torch.optim.SGD(student.parameters(), lr=0.5), None))

    batch = SequenceCollator(max_length=6)(splits["train"].to_list())
    mask = batch["labels"] != -100
    negatives = draw_negatives(12, 5, (3, 0))
    rows = torch.cat([negatives, batch["labels"][mask]])
    loss = sampled_distillation_loss(
        by_hand.encode(batch["item_ids"])[mask],
        by_hand.item_matrix()[rows],
        batch["labels"][mask],
        teacher.eval().encode(batch["item_ids"])[mask].detach(),
        teacher.item_matrix().detach()[rows],
        negatives=negatives,
        num_items=12,
        temperature=2.0,
        kl_weight=0.5,
    ).loss
    loss.backward()
    assert torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.3) > 0.3
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.5 * parameter.grad
    # A linear schedule of one step starts at the full rate.
    torch.testing.assert_close(weights(student), weights(by_hand), atol=1e-6, rtol=1e-5)
    assert not torch.equal(weights(student), weights(before))


def test_only_rows_that_take_part_move(make_crm, splits, arguments):
    model = make_crm(0)
    one = splits["train"].select([0])
    before = model.item_matrix().detach().clone()
    train(model, arguments(max_steps=1, seed=1), {**splits, "train": one})
    part = set(one[0]["item_ids"]) | set(draw_negatives(12, 5, (1, 0)).tolist())
    moved = {row for row in range(13) if not torch.equal(model.item_matrix()[row], before[row])}
    assert moved == part
    assert 0 not in moved and len(part) < 12


def test_a_model_is_as_before_when_training_ends(make_crm, arguments, splits):
    trainer = train(make_crm(0), arguments(), splits, make_crm(1))
    assert isinstance(trainer.optimizer.optimizer, RowAdamW)
    assert not trainer.model.item_embedding.sparse
    assert not trainer.model.item_matrix()[0].any()


@pytest.mark.parametrize("size", [12, 13, None])
def test_a_sample_of_all_items_is_the_full_loss(make_crm, arguments, splits, size):
    expected = train(make_crm(0), arguments("full", num_sampled_items=None), splits, make_crm(1))
    actual = train(make_crm(0), arguments("all", num_sampled_items=size), splits, make_crm(1))
    assert losses(actual) == losses(expected)
    assert torch.equal(weights(actual.model), weights(expected.model))


def test_training_learns_the_walk(make_crm, arguments, splits):
    args = arguments(num_train_epochs=40, bf16=True)
    trainer = CRMTrainer(make_crm(), args, splits["train"], splits["validation"])
    before = trainer.evaluate()["eval_ndcg@10"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ndcg@10"] > before + 0.2
    assert after["eval_hr@5"] > 0.85


def test_gru4rec(arguments, splits):
    torch.manual_seed(0)
    model = GRU4RecModel(GRU4RecConfig(num_items=12, hidden_size=8, max_length=6))
    trainer = train(model, arguments(num_train_epochs=10), splits)
    assert isinstance(trainer.optimizer.optimizer, RowAdamW)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1


def test_a_model_without_an_embedding_keeps_its_dense_gradient(make_llm, make_crm, arguments, splits):
    args = arguments(kind=MutualDistillArguments, optim="sgd", learning_rate=0.5, num_train_epochs=10)
    trainer = train(make_llm(), args, splits, make_crm(1), MutualDistillTrainer)
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1


def test_accumulated_steps_equal_the_big_batch(make_crm, arguments, splits):
    """38 rows in batches of 12, and in 3 accumulated batches of 4: all of a step share its sample."""
    data = {**splits, "train": splits["train"].select(range(38))}
    big = train(make_crm(0), arguments("big", per_device_train_batch_size=12), data, make_crm(1))
    args = arguments("small", per_device_train_batch_size=4, gradient_accumulation_steps=3)
    small = train(make_crm(0), args, data, make_crm(1))
    assert losses(small) == pytest.approx(losses(big), abs=1e-5)
    torch.testing.assert_close(small.model.item_matrix(), big.model.item_matrix(), atol=1e-5, rtol=1e-4)


def test_resumed_training_equals_uninterrupted(make_crm, arguments, splits):
    settings = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 7}
    whole = train(make_crm(0, dropout=0.3), arguments("whole", **settings), splits, make_crm(1))
    cut = CRMTrainer(make_crm(0, dropout=0.3), arguments("cut", **settings), splits["train"], teacher=make_crm(1))
    cut.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-7")
    assert torch.equal(weights(whole.model), weights(cut.model))


def test_steps_draw_different_samples_and_seeds_decide(make_crm, arguments, splits):
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 40}

    def draw(name, **changes):
        return train(make_crm(0), arguments(name, **settings | changes), splits)

    first = losses(draw("one", num_train_epochs=4, length_bucketing=False))
    assert len(set(first)) == len(first) == 4
    assert losses(draw("again", num_train_epochs=4, length_bucketing=False)) == first
    assert losses(draw("other", seed=7)) != first[:1]


def test_a_new_model_of_model_init_gets_sparse_gradients_too(make_crm, arguments, splits):
    trainer = CRMTrainer(args=arguments(), train_dataset=splits["train"], model_init=lambda: make_crm(0))
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert torch.equal(weights(trainer.model), first)
    assert isinstance(trainer.optimizer.optimizer, RowAdamW)


def test_where_sparse_gradients_do_not_work(make_crm, arguments, splits, monkeypatch):
    with pytest.raises(ConfigurationError, match="optim must be one of .*adamw_torch.*got 'sgd'"):
        train(make_crm(0), arguments(optim="sgd"), splits)
    model = make_crm(0)
    for given in (
        {"optimizers": (torch.optim.AdamW(model.parameters()), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 0.1})},
    ):
        with pytest.raises(ConfigurationError, match="a sparse gradient, which AdamW does not take: give .*RowAdamW"):
            train(model, arguments(), splits, **given)
    train(model, arguments(max_steps=1), splits, optimizers=(RowAdamW(model.parameters()), None))
    trainer = CRMTrainer(make_crm(0), arguments(), splits["train"])
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ConfigurationError, match="not over NCCL, in DataParallel, FSDP or DeepSpeed"):
        trainer.train()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", False)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(CRMArguments, "world_size", 2)
    with pytest.raises(ConfigurationError, match="not over NCCL"):
        trainer.train()
    assert not trainer.model.item_embedding.sparse
