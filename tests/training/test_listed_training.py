# SPDX-License-Identifier: Apache-2.0
"""Trainers whose teacher lists its best items."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cached_rows import (
    lookup,
)

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    MutualDistillArguments,
    MutualDistillTrainer,
    SequenceCollator,
    distillation_loss,
)
from llmd4rec_hf.errors import CacheError, ConfigurationError


def train(trainer_class, args, model, splits, teacher):
    trainer = trainer_class(model, args, splits["train"], splits["validation"], teacher=teacher)
    trainer.train()
    return trainer


QUIET = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}


def test_a_crm_learns_from_lists(walks, make_crm, splits, tmp_path):
    args = CRMArguments(str(tmp_path / "run"), num_train_epochs=30, learning_rate=1e-2, weighting="none", **QUIET)
    args.per_device_train_batch_size = 8
    trainer = train(CRMTrainer, args, make_crm(), splits, walks)
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    assert logs[-1]["kl"] < 0.3 * logs[0]["kl"]
    assert logs[-1]["agreement"] > logs[0]["agreement"] + 0.1
    assert trainer.evaluate()["eval_hr@5"] > 0.9


def test_one_step_is_the_loss_written_out(walks, make_crm, splits, tmp_path):
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 1, "max_grad_norm": 0.0, **QUIET}
    args = CRMArguments(str(tmp_path / "run"), per_device_train_batch_size=40, loss_normalization="batch", **settings)
    student, by_hand = make_crm(0), make_crm(0)
    train(CRMTrainer, args, student, splits, walks)
    batch = SequenceCollator(max_length=6)(splits["train"].to_list())
    keep = batch["labels"] != -100
    distillation_loss(
        by_hand.encode(batch["item_ids"])[keep],
        by_hand.item_matrix(),
        batch["labels"][keep],
        teacher_lists=lookup(walks, batch),
        temperature=2.0,
        kl_weight=0.5,
    ).loss.backward()
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.5 * theirs.grad, atol=1e-6, rtol=1e-5)


def test_an_llm_learns_from_lists(walks, make_llm, splits, tmp_path):
    args = MutualDistillArguments(str(tmp_path / "run"), max_steps=2, refresh_item_vectors=False, **QUIET)
    trainer = train(MutualDistillTrainer, args, make_llm(), splits, walks)
    assert trainer.state.log_history[0]["kl"] > 0


def test_what_a_black_box_cannot_give(walks, make_crm, make_llm, splits, tmp_path):
    folder = str(tmp_path / "run")
    with pytest.raises(ConfigurationError, match="no item vectors to inject: set refresh_item_vectors=False"):
        MutualDistillTrainer(make_llm(), MutualDistillArguments(folder, **QUIET), splits["train"], teacher=walks)
    args = CRMArguments(folder, init_item_vectors=True, **QUIET)
    with pytest.raises(ConfigurationError, match="no item vectors to begin with: set init_item_vectors=False"):
        CRMTrainer(make_crm(), args, splits["train"], teacher=walks)


def test_lists_and_a_sample_of_the_items(walks, make_crm, splits, tmp_path):
    args = CRMArguments(str(tmp_path / "run"), num_train_epochs=30, learning_rate=1e-2, num_sampled_items=8, **QUIET)
    args.per_device_train_batch_size = 8
    trainer = train(CRMTrainer, args, make_crm(), splits, walks)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert 0 < np.mean(kl[-20:]) < 0.7 * np.mean(kl[:20])
    assert trainer.evaluate()["eval_hr@5"] > 0.9


def test_another_catalogue_vocabulary_or_data(walks, walker, make_crm, splits, vocabulary, tmp_path):
    args = CRMArguments(str(tmp_path / "run"), **QUIET)
    with pytest.raises(ConfigurationError, match="The teacher scores 12 items and the student 5"):
        CRMTrainer(make_crm(num_items=5), args, splits["train"], teacher=walks)
    student = make_crm()
    student.vocabulary = ItemVocabulary([*vocabulary.item_ids[:-1], "other"])
    with pytest.raises(ConfigurationError, match="different item vocabularies"):
        CRMTrainer(student, args, splits["train"], teacher=walks)
    with pytest.raises(CacheError, match="its data_hash is"):
        CRMTrainer(make_crm(), args, splits["train"].select(range(5)), teacher=walks)
