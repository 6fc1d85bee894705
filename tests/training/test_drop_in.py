# SPDX-License-Identifier: Apache-2.0
"""What works with `Trainer` works with the trainers of this package."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer, SequenceCollator
from llmd4rec_hf.errors import ConfigurationError


@pytest.fixture
def arguments(tmp_path):
    def make(kind=TrainingArguments, **settings):
        defaults = {"use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1}
        defaults |= {"per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "no"}
        return kind(str(tmp_path / "run"), **{**defaults, **settings})

    return make


class Losses(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])


def script(trainer_class, model, args, splits, **kwargs):
    """A script as a user of `Trainer` has it."""
    losses = Losses()
    trainer = trainer_class(
        model=model,
        args=args,
        data_collator=SequenceCollator(max_length=6),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        callbacks=[losses],
        **kwargs,
    )
    trainer.train()
    return trainer, losses.values


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("side", ["crm", "llm"])
def test_the_class_name_alone(make_crm, make_llm, arguments, splits, side, accumulation):
    make, trainer_class = (make_crm, CRMTrainer) if side == "crm" else (make_llm, MutualDistillTrainer)
    args = arguments(gradient_accumulation_steps=accumulation, learning_rate=1e-2)
    plain, expected = script(Trainer, make(dropout=0.1), args, splits)
    ours, found = script(trainer_class, make(dropout=0.1), args, splits)
    assert ours.args is args
    assert len(found) == len(expected) == ours.state.global_step
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
    for (name, mine), theirs in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5, msg=name)


def test_own_arguments_can_say_the_same(make_crm, arguments, splits):
    settings = {"kl_weight": 0.0, "loss_normalization": "batch", "length_bucketing": False}
    args = arguments(CRMArguments, **settings)
    expected, found = (script(kind, make_crm(), args, splits)[1] for kind in (Trainer, CRMTrainer))
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_compute_metrics_gets_ranks_and_true_items(make_crm, arguments, splits):
    seen = {}

    def compute_metrics(prediction):
        seen["ranks"], seen["items"] = prediction.predictions, prediction.label_ids
        return {"mean_rank": float(prediction.predictions.mean())}

    trainer, _ = script(CRMTrainer, make_crm(), arguments(), splits, compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_mean_rank"] == seen["ranks"].mean()
    assert "eval_ndcg@10" not in metrics
    assert seen["ranks"].shape == (40,) and seen["ranks"].min() >= 1
    assert seen["items"].tolist() == [row["item_ids"][-1] for row in splits["validation"]]


def test_plain_arguments_with_a_teacher_distil(make_crm, make_llm, arguments, splits):
    trainer, losses = script(MutualDistillTrainer, make_llm(), arguments(), splits, teacher=make_crm())
    assert math.isfinite(losses[-1])
    assert "kl" in trainer.state.log_history[0]
    assert trainer.model.item_vectors.any()


def test_a_collator_of_ones_own(make_crm, arguments, splits):
    """Without mask and row ids, which a model does not need."""

    def collate(rows):
        batch = SequenceCollator(max_length=6)(rows)
        return {name: batch[name] for name in ("item_ids", "labels")}

    args = arguments()
    expected = script(CRMTrainer, make_crm(), args, splits)[1]
    trainer = CRMTrainer(make_crm(), args, splits["train"], data_collator=collate, callbacks=[losses := Losses()])
    trainer.train()
    assert losses.values == expected
    taught = CRMTrainer(make_crm(), args, splits["train"], data_collator=collate, teacher=make_crm(1))
    with pytest.raises(ConfigurationError, match="no row_id"):
        taught.train()


def test_model_init(make_crm, make_llm, arguments, splits):
    """Each training begins with a new model, and the new one gets what a teacher injects."""
    models = []

    def init():
        models.append(make_llm(seed=len(models)))
        return models[-1]

    teacher = make_crm()
    trainer = MutualDistillTrainer(
        model_init=init, args=arguments(), train_dataset=splits["train"], eval_dataset=splits["test"], teacher=teacher
    )
    assert trainer.data_collator.max_length == 6
    for _ in range(2):
        trainer.train()
        assert trainer.model is models[-1]
        assert models[-1].item_vectors.any()
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert len(models) == 3
    with pytest.raises(ConfigurationError, match="trains a RecommenderModel, got Linear"):
        CRMTrainer(model_init=lambda: nn.Linear(1, 1), args=arguments())


def test_search_over_the_model(make_crm, arguments, splits):
    """As in a hyperparameter search: each `train` builds a model of another shape, and the collator follows."""
    lengths = iter((6, 3, 5))
    trainer = CRMTrainer(
        model_init=lambda: make_crm(max_length=next(lengths)),
        args=arguments(CRMArguments, num_train_epochs=1),
        train_dataset=splits["train"],
    )
    for max_length in (3, 5):
        trainer.train()
        assert trainer.data_collator.max_length == trainer.model.config.max_length == max_length


def test_trials_of_a_search(make_crm, arguments, splits):
    """Between two of them `Trainer` drops the model, and each has a learning rate of its own."""
    trainer = CRMTrainer(
        model_init=lambda trial: make_crm(),
        args=arguments(CRMArguments, num_train_epochs=1, num_sampled_items=5),
        train_dataset=splits["train"],
        teacher=make_crm(1),
    )
    for rate in (1e-3, 1e-2):
        trainer.args.learning_rate = rate
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] == rate
        trainer.model_wrapped = trainer.model = None


@pytest.mark.parametrize("side", ["crm", "llm"])
def test_torch_compile(make_crm, make_llm, arguments, splits, side):
    make, trainer_class = (make_crm, CRMTrainer) if side == "crm" else (make_llm, MutualDistillTrainer)
    settings = {"max_steps": 3, "learning_rate": 1e-2}
    expected = script(trainer_class, make(), arguments(**settings), splits)[1]
    compiled = arguments(torch_compile=True, torch_compile_backend="eager", **settings)
    trainer, found = script(trainer_class, make(), compiled, splits)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_activation_checkpointing(make_llm, arguments, splits):
    expected = script(MutualDistillTrainer, make_llm(), arguments(), splits)[1]
    names = ("activation_checkpointing", "gradient_checkpointing")  # its name in earlier releases
    name = next(name for name in names if name in TrainingArguments.__dataclass_fields__)
    trainer, found = script(MutualDistillTrainer, make_llm(), arguments(**{name: True}), splits)
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.backbone.modules())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_save_total_limit_keeps_the_best(make_crm, arguments, splits, tmp_path):
    args = arguments(
        num_train_epochs=5,
        save_strategy="epoch",
        eval_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="ndcg@10",
    )
    trainer, _ = script(CRMTrainer, make_crm(), args, splits)
    kept = {path.name for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept <= {"checkpoint-25", trainer.state.best_model_checkpoint.split("/")[-1]}


def test_the_other_sides_arguments(make_llm, arguments):
    with pytest.raises(ConfigurationError, match="CRMArguments are the arguments of another trainer"):
        MutualDistillTrainer(make_llm(), arguments(CRMArguments))
    with pytest.raises(ConfigurationError, match="MutualDistillArguments are the arguments of another trainer"):
        CRMTrainer(make_llm(), arguments(MutualDistillArguments))
