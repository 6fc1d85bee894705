# SPDX-License-Identifier: Apache-2.0
"""Batches of like length, and training with those that are capped by their padded positions."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._dynamo
from datasets import Dataset
from trained import losses, weights
from transformers import TrainerCallback

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer, SequenceCollator
from llmd4rec_hf.errors import ConfigurationError


@pytest.fixture
def arguments(make_arguments):
    return partial(make_arguments, max_positions_per_batch=24)


def test_batches_keep_to_the_budget_and_hold_each_row_once(make_crm, arguments, splits):
    """The longest histories have 6 positions: four of them fit into 24, and 24 of a single position."""
    trainer = CRMTrainer(make_crm(), arguments(), splits["train"])
    loader = trainer.get_train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    assert sorted(row for batch in batches for row in batch["row_id"].tolist()) == sorted(splits["train"]["row_id"])
    assert all(batch["item_ids"].numel() <= 24 for batch in batches)
    assert max(batch["item_ids"].shape[1] for batch in batches) == 6
    assert not all(batch["attention_mask"].all() for batch in batches)


def test_positions_are_those_that_are_read_one_at_least(make_crm, arguments):
    """Of 1, 2, 4 and 9 items, by a model that reads 6 and by a collator that leaves 3."""
    lengths = [1, 2, 4, 9]
    rows = Dataset.from_dict({"item_ids": [[1] * n for n in lengths], "length": lengths, "row_id": [0, 1, 2, 3]})
    trainer = CRMTrainer(make_crm(), arguments(), rows)
    assert trainer._budgeted_batches().positions.tolist() == [1, 1, 3, 6]
    trainer = CRMTrainer(make_crm(), arguments(), rows, data_collator=SequenceCollator(max_length=3))
    assert trainer._budgeted_batches().positions.tolist() == [1, 1, 3, 3]
    assert trainer._mean_positions == (0 + 1 + 3 + 3) / 4


def test_accelerate_evens_out_other_batches_alone(make_crm, arguments, splits, monkeypatch):
    trainer = CRMTrainer(make_crm(), arguments(), splits["train"])
    accelerator, seen = trainer.accelerator, []
    monkeypatch.setattr(accelerator, "prepare", lambda loader: seen.append(accelerator.even_batches) or loader)
    trainer.get_train_dataloader()
    assert (seen, accelerator.even_batches) == ([False], True)


@pytest.mark.parametrize(("settings", "seed"), [({"seed": 7}, 7), ({"seed": 7, "data_seed": 5}, 5)])
@pytest.mark.parametrize("budget", [None, 24])
def test_the_order_follows_the_seed_of_the_data(make_crm, arguments, splits, settings, seed, budget):
    trainer = CRMTrainer(make_crm(), arguments(max_positions_per_batch=budget, **settings), splits["train"])
    sampler = trainer._get_train_sampler() if budget is None else trainer._budgeted_batches()
    assert sampler.seed == seed


@pytest.mark.parametrize(("drop_last", "rows"), [(False, 10), (True, 12)])
def test_rows_that_are_used_together_are_of_like_length(make_crm, make_arguments, splits, drop_last, rows):
    """Over the accumulated batches of a step: 40 rows make three of 12 and one of 4, 10 on average."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "dataloader_drop_last": drop_last}
    trainer = CRMTrainer(make_crm(), make_arguments(**settings), splits["train"])
    assert trainer._get_train_sampler().batch_size == 12
    assert trainer._rows_per_step == rows


@pytest.mark.parametrize(
    ("settings", "left"), [({}, 8), ({"dataloader_drop_last": True}, -1), ({"max_positions_per_batch": 24}, -1)]
)
def test_what_is_left_for_the_last_batches_of_a_resumed_epoch(make_crm, make_arguments, splits, settings, left):
    """Of 40 rows in batches of 16 over all processes 8; none, or nobody knows, where no row comes a second time."""
    trainer = CRMTrainer(make_crm(), make_arguments(**settings), splits["train"])
    trainer.get_train_dataloader()
    trainer.callback_handler.train_dataloader = SimpleNamespace(total_batch_size=16)
    assert trainer._remainder() == left


@pytest.mark.parametrize("bucketing", [True, False])
def test_no_row_is_left_out_of_a_ranking(make_crm, make_arguments, splits, bucketing):
    """40 rows are five batches of 7 and one that is not full."""
    args = make_arguments(dataloader_drop_last=True, per_device_eval_batch_size=7, length_bucketing=bucketing)
    trainer = CRMTrainer(make_crm(0), args, splits["train"], splits["test"])
    ranks = trainer.predict(splits["test"]).predictions
    whole = CRMTrainer(make_crm(0), make_arguments(), splits["train"]).predict(splits["test"]).predictions
    assert ranks.tolist() == whole.tolist()
    assert trainer.evaluate()["eval_mrr@20"] == pytest.approx((1 / whole).mean())
    assert args.dataloader_drop_last


def test_training_learns_the_walk(make_crm, arguments, splits):
    args = arguments(num_train_epochs=40, learning_rate=1e-2, logging_steps=100)
    trainer = CRMTrainer(make_crm(), args, splits["train"], splits["validation"])
    trainer.train()
    assert trainer.evaluate()["eval_hr@5"] > 0.9


def test_the_llm_learns_from_a_crm(make_crm, make_llm, arguments, splits):
    args = arguments(kind=MutualDistillArguments)
    trainer = MutualDistillTrainer(make_llm(), args, splits["train"], splits["validation"], teacher=make_crm())
    trainer.train()
    found = losses(trainer)
    assert len(found) == trainer.state.global_step
    assert np.mean(found[-3:]) < np.mean(found[:3])


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_every_position_counts_the_same(make_crm, arguments, splits, accumulation):
    """With one fixed set of weights the mean of an epoch's losses is the mean loss of a position."""
    settings = {"learning_rate": 0.0, "num_train_epochs": 1}
    args = arguments(gradient_accumulation_steps=accumulation, **settings)
    trainer = CRMTrainer(make_crm(0), args, splits["train"])
    trainer.train()
    whole = arguments("whole", max_positions_per_batch=None, per_device_train_batch_size=40, **settings)
    whole = CRMTrainer(make_crm(0), whole, splits["train"])
    whole.train()
    assert len(losses(trainer)) == math.ceil(len(trainer.get_train_dataloader()) / accumulation)
    assert np.mean(losses(trainer)) == pytest.approx(losses(whole)[0], rel=1e-5)
    # By hand: each row once, at most six positions of it.
    positions = np.minimum(np.array(splits["train"]["length"]) - 1, 6).sum()
    steps = len(losses(trainer))
    assert trainer._loss_divisor(torch.ones(3), None) == pytest.approx(positions / steps)


def test_schedule_and_rates_know_the_number_of_steps(make_crm, arguments, splits):
    args = arguments(lr_scheduler_type="linear", num_train_epochs=3)
    trainer = CRMTrainer(make_crm(), args, splits["train"])
    outcome = trainer.train()
    steps = len(trainer.get_train_dataloader())
    assert trainer.state.max_steps == trainer.state.global_step == 3 * steps
    assert trainer.state.epoch == 3
    assert trainer.lr_scheduler.get_last_lr()[0] == 0.0
    rate = outcome.metrics["train_samples_per_second"] / outcome.metrics["train_steps_per_second"]
    assert rate == pytest.approx(len(splits["train"]) / steps, rel=0.05)
    assert trainer.get_total_train_batch_size(args) == round(len(splits["train"]) / steps)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("normalization", ["dataset", "batch"])
def test_resumed_training_equals_uninterrupted(make_crm, arguments, splits, accumulation, normalization):
    """From the middle of the second of three epochs, to the last bit."""
    settings = {"num_train_epochs": 3, "gradient_accumulation_steps": accumulation}
    settings |= {"loss_normalization": normalization, "save_strategy": "steps", "save_steps": 1}
    whole = CRMTrainer(make_crm(0, dropout=0.3), arguments("whole", **settings), splits["train"], teacher=make_crm(1))
    whole.train()
    middle = int(1.5 * whole.state.max_steps / 3)
    assert middle % (whole.state.max_steps // 3)
    cut = CRMTrainer(make_crm(0, dropout=0.3), arguments("cut", **settings), splits["train"], teacher=make_crm(1))
    cut.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{middle}")
    assert losses(cut) == losses(whole)
    assert torch.equal(weights(whole.model), weights(cut.model))


@pytest.mark.parametrize("dynamic", [True, False])
def test_nothing_is_compiled_after_the_first_epoch(make_crm, arguments, splits, dynamic):
    graphs = []

    class Count(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = arguments(num_train_epochs=3, torch_compile=True, torch_compile_backend="eager")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=dynamic):
        CRMTrainer(make_crm(), args, splits["train"], callbacks=[Count()]).train()
    # The first shape and what may vary, or one graph for each of at most six lengths and the end.
    assert 1 <= graphs[0] == graphs[1] == graphs[2] <= 7


def test_the_seed_alone_decides(make_crm, arguments, splits):
    def run(name, seed):
        trainer = CRMTrainer(make_crm(0), arguments(name, data_seed=seed), splits["train"])
        trainer.train()
        return losses(trainer)

    first = run("first", 1)
    assert run("again", 1) == first
    assert run("other", 2) != first


def test_padding_of_the_collator_counts(make_crm, arguments, splits):
    """Histories of 4, 5 and 6 positions all take 6: fewer shapes, and none above the budget."""
    collator = SequenceCollator(max_length=6, pad_to_multiple_of=3)
    trainer = CRMTrainer(make_crm(), arguments(), splits["train"], data_collator=collator)
    shapes = [tuple(batch["item_ids"].shape) for batch in trainer.get_train_dataloader()]
    assert {width for _, width in shapes} <= {3, 6}
    assert {shape for shape in shapes[:-1] if shape[1] == 6} == {(4, 6)}
    assert all(rows * width <= 24 for rows, width in shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_positions_per_batch": 0}, "max_positions_per_batch must be at least 1, or left out, got 0"),
        ({"length_bucketing": False}, "max_positions_per_batch is for histories of like length"),
        ({"auto_find_batch_size": True}, "does not go with auto_find_batch_size"),
        ({"dataloader_drop_last": True}, "does not go with dataloader_drop_last"),
        ({"accelerator_config": {"split_batches": True}}, "does not go with accelerator_config.split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "does not go with accelerator_config.dispatch_batches"),
    ],
)
def test_settings_that_contradict_it_are_refused(arguments, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        arguments(**settings)


def test_several_gpus_in_one_process_are_refused(arguments, monkeypatch):
    monkeypatch.setattr(CRMArguments, "n_gpu", 2)
    with pytest.raises(ConfigurationError, match="does not go with DataParallel .*accelerate launch"):
        arguments()


def test_data_that_it_cannot_batch_is_refused_before_the_teacher_runs(make_crm, arguments, splits, tmp_path):
    def train(data, **settings):
        CRMTrainer(make_crm(), arguments(**settings), data, teacher=make_crm(1)).train()

    with pytest.raises(ConfigurationError, match="max_positions_per_batch=5, but the longest history takes 6 pos"):
        train(splits["train"], max_positions_per_batch=5)
    with pytest.raises(ConfigurationError, match="needs the lengths of all rows: .*, got Dataset without one"):
        train(splits["train"].remove_columns("length"))
    with pytest.raises(ConfigurationError, match="got IterableDataset without one"):
        train(splits["train"].to_iterable_dataset(), max_steps=2)
    assert not (tmp_path / "run" / "_teacher_cache").exists()
