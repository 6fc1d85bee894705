# SPDX-License-Identifier: Apache-2.0
"""What a trainer saves, and what it goes on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from trained import train, weights
from transformers import Trainer

from llmd4rec_hf import CRMTrainer, RecommenderModel, SASRecConfig
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.training.loss_sums import LOSS_SUMS_NAME, LossSums


def test_resumed_training_equals_uninterrupted(make_crm, arguments, splits):
    settings = {"num_train_epochs": 4, "save_strategy": "steps", "save_steps": 7}
    whole = train(make_crm(0, dropout=0.3), arguments("whole", **settings), splits, make_crm(1))
    args = arguments("cut", **settings)
    cut = CRMTrainer(make_crm(0, dropout=0.3), args, splits["train"], teacher=make_crm(1))
    cut.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-7")
    assert torch.equal(weights(whole.model), weights(cut.model))


def test_best_model_comes_back(make_crm, arguments, splits):
    # Where less counts as better, the best is not the last: this model gets better with every epoch.
    args = arguments(
        num_train_epochs=4,
        learning_rate=0.05,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="ndcg@10",
        greater_is_better=False,
    )
    trainer = train(make_crm(0), args, splits)
    values = [entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry]
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(min(values))
    assert trainer.evaluate()["eval_ndcg@10"] != pytest.approx(values[-1])


def test_a_checkpoint_that_is_not_there_or_torn_is_named(make_crm, arguments, splits):
    with pytest.raises(ConfigurationError, match="no checkpoint nowhere to resume from"):
        CRMTrainer(make_crm(), arguments(), splits["train"]).train(resume_from_checkpoint="nowhere")
    args = arguments(save_strategy="epoch", num_train_epochs=1)
    train(make_crm(0), args, splits)
    (folder,) = Path(args.output_dir).glob("checkpoint-*")
    with pytest.raises(ConfigurationError, match="do not fit this model"):
        make_crm(hidden_size=4).load_weights(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ConfigurationError, match="torn or altered. resume_from_checkpoint=True takes the last"):
        CRMTrainer(make_crm(), arguments(), splits["train"]).train(resume_from_checkpoint=str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigurationError, match="has written does not say whether it is whole: give its path"):
        CRMTrainer(make_crm(), args, splits["train"]).train(resume_from_checkpoint=True)


def test_arguments_are_saved_as_they_are(make_crm, arguments, splits, monkeypatch):
    """But for the token; and `Trainer` deletes no checkpoint meanwhile."""
    found, save = [], Trainer._save

    def record(trainer, *args):
        found.append((trainer.args.save_total_limit, trainer.args.hub_token))
        save(trainer, *args)

    monkeypatch.setattr(Trainer, "_save", record)
    args = arguments(save_strategy="epoch", save_total_limit=1, hub_token="hf_secret")
    train(make_crm(0), args, splits).save_model()
    assert found == [(1, None)] * 3
    assert (args.save_total_limit, args.hub_token) == (1, "hf_secret")


def test_no_process_goes_on_before_a_checkpoint_is_closed(make_crm, arguments, splits, monkeypatch):
    """With the sums of all processes. Nor does one go on if another cannot close it."""
    folders, waits = [], []

    def wait(accelerator):
        waits.append(any(Path(args.output_dir).glob("checkpoint-*/trainer_state.json")))

    def together(work):
        assert waits[-1], "another process may still be writing"
        (folder,) = Path(args.output_dir).glob("checkpoint-*")
        before = (folder / "manifest.json").exists()
        work()
        folders.append((before, (folder / "manifest.json").exists()))

    monkeypatch.setattr("accelerate.Accelerator.wait_for_everyone", wait)
    monkeypatch.setattr("llmd4rec_hf.training.trainer.on_every_process", together)
    monkeypatch.setattr(LossSums, "over_processes", lambda sums, accelerator: {"positions": 7.0})
    args = arguments(save_strategy="epoch", num_train_epochs=1)
    train(make_crm(0), args, splits)
    assert folders == [(False, True)]
    (folder,) = Path(args.output_dir).glob("checkpoint-*")
    assert json.loads((folder / LOSS_SUMS_NAME).read_text()) == {"positions": 7.0}


def test_the_main_process_alone_chooses_and_mends_a_checkpoint(make_crm, arguments, splits, monkeypatch):
    """The others take what it has chosen, and leave the files as they are."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "ndcg@10"}
    args = arguments(num_train_epochs=1, **settings)
    train(make_crm(0), args, splits)
    folder = Path(args.output_dir).rename(Path(args.output_dir).with_name("moved"))
    (checkpoint,) = folder.glob("checkpoint-*")
    before = (checkpoint / "trainer_state.json").read_bytes()
    monkeypatch.setattr("llmd4rec_hf.training.trainer.on_main_process", lambda work: str(checkpoint))
    trainer = CRMTrainer(
        make_crm(1), arguments("empty", num_train_epochs=1, **settings), splits["train"], splits["validation"]
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5
    assert (checkpoint / "trainer_state.json").read_bytes() == before


class HeadModel(RecommenderModel):
    """Scores by a head that has the weights of its embedding."""

    config_class = SASRecConfig
    _tied_weights_keys = {"head.weight": "items.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.items = nn.Embedding(config.num_items + 1, config.hidden_size, padding_idx=0)
        self.head = nn.Linear(config.hidden_size, config.num_items + 1, bias=False)
        self.post_init()

    def encode(self, item_ids, attention_mask=None):
        return self.items(item_ids)

    def item_matrix(self):
        return self.head.weight


def test_a_model_with_tied_weights_gets_its_best_ones_back(arguments, splits):
    config = SASRecConfig(num_items=12, hidden_size=8, num_layers=1, max_length=6, tie_word_embeddings=True)
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    model = HeadModel(config)
    train(model, arguments(num_train_epochs=2, metric_for_best_model="ndcg@10", **settings), splits)
    assert model.head.weight is model.items.weight


def test_checkpoints_hold_the_vocabulary_and_no_pickled_weights(make_crm, arguments, splits, vocabulary):
    model = make_crm(0)
    model.vocabulary = vocabulary
    args = arguments(save_strategy="epoch", num_train_epochs=1)
    train(model, args, splits)
    (folder,) = Path(args.output_dir).glob("checkpoint-*")
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "vocabulary.json").read_text())
