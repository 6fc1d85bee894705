# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn
from trained import train, weights

from llmd4rec_hf import (
    CRMTrainer,
    GRU4RecConfig,
    GRU4RecModel,
    ItemVocabulary,
    MutualDistillArguments,
    MutualDistillTrainer,
    RecommenderEnsemble,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
    SequenceCollator,
    TeacherCache,
    distillation_loss,
    ranking_metrics,
)
from llmd4rec_hf.distillation import teacher_cache
from llmd4rec_hf.errors import CacheError, ConfigurationError
from llmd4rec_hf.models import RecBoleSASRecConfig, RecBoleSASRecModel
from llmd4rec_hf.training import mutual_distill_trainer
from llmd4rec_hf.training import trainer as trainer_module


def test_training_learns_the_walk(make_crm, arguments, splits):
    args = arguments(num_train_epochs=40, learning_rate=1e-2)
    trainer = CRMTrainer(make_crm(), args, splits["train"], splits["validation"])
    before = trainer.evaluate()["eval_ndcg@10"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ndcg@10"] > before + 0.2
    assert after["eval_hr@5"] > 0.9


def test_one_step_equals_the_loss_written_out(make_crm, arguments, splits):
    """One SGD step of the trainer against the same step by hand: the loss over all positions, one after the other."""
    student, teacher = make_crm(0), make_crm(1, hidden_size=4)
    by_hand = copy.deepcopy(student)
    args = arguments(
        optim="sgd",
        learning_rate=0.5,
        max_steps=1,
        per_device_train_batch_size=40,
        max_grad_norm=0.0,
        loss_normalization="batch",
        temperature=1.5,
        kl_weight=0.7,
    )
    train(student, args, splits, teacher)

    batch = SequenceCollator(max_length=6)(splits["train"].to_list())
    mask = batch["labels"] != -100
    loss = distillation_loss(
        by_hand.encode(batch["item_ids"])[mask],
        by_hand.item_matrix(),
        batch["labels"][mask],
        teacher.eval().encode(batch["item_ids"])[mask].detach(),
        teacher.item_matrix().detach(),
        temperature=1.5,
        kl_weight=0.7,
    ).loss
    loss.backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(weights(student), weights(by_hand), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalization", ["dataset", "batch"])
def test_accumulated_steps_equal_the_big_batch(make_crm, arguments, splits, normalization):
    """38 rows in batches of 12, and in 3 accumulated batches of 4: the tail of 2 rows included."""
    data = {**splits, "train": splits["train"].select(range(38))}
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "loss_normalization": normalization}
    big, small = make_crm(0), make_crm(0)
    teacher = make_crm(1)
    train(big, arguments("big", per_device_train_batch_size=12, **settings), data, teacher)
    args = arguments("small", per_device_train_batch_size=4, gradient_accumulation_steps=3, **settings)
    train(small, args, data, teacher)
    torch.testing.assert_close(weights(small), weights(big), atol=2e-6, rtol=1e-5)


def test_every_position_counts_the_same_with_dataset_normalization(make_crm, arguments, splits):
    """With one fixed set of weights the epoch's summed loss is that of one batch with everything in it."""
    settings = {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 1, "max_grad_norm": 0.0}
    model = make_crm(0)
    small = train(model, arguments("a", per_device_train_batch_size=8, **settings), splits)
    whole = train(model, arguments("b", per_device_train_batch_size=40, **settings), splits)
    losses = [entry["loss"] for entry in small.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert np.mean(losses) == pytest.approx(whole.state.log_history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_half_precision_reaches_the_loss(make_crm, arguments, splits, monkeypatch, bf16, dtype):
    seen = set()

    def record(*args, **kwargs):
        seen.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return distillation_loss(*args, **kwargs)

    monkeypatch.setattr("llmd4rec_hf.training.trainer.distillation_loss", record)
    train(make_crm(0), arguments(bf16=bf16), splits, make_crm(1))
    assert seen == {dtype}


def test_teacher_gets_no_gradient_and_does_not_change(make_crm, arguments, splits):
    teacher = make_crm(1).train()
    before = teacher.content_hash()
    train(make_crm(0), arguments(), splits, teacher)
    assert teacher.content_hash() == before
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_moves_the_student(make_crm, arguments, splits):
    alone, taught = make_crm(0), make_crm(0)
    train(alone, arguments("alone"), splits)
    train(taught, arguments("taught"), splits, make_crm(1))
    assert not torch.equal(weights(alone), weights(taught))


def test_kl_weight_zero_is_no_teacher(make_crm, arguments, splits):
    alone, taught = make_crm(0), make_crm(0)
    train(alone, arguments("alone"), splits)
    train(taught, arguments("taught", kl_weight=0.0), splits, make_crm(1))
    torch.testing.assert_close(weights(alone), weights(taught), atol=1e-6, rtol=1e-5)


def test_cache_and_model_are_the_same_teacher(make_crm, arguments, splits, tmp_path):
    teacher = make_crm(1)
    cache = TeacherCache.build(teacher, splits["train"], tmp_path / "cache")
    first, second = make_crm(0), make_crm(0)
    train(first, arguments("model"), splits, teacher)
    train(second, arguments("cache"), splits, cache)
    assert torch.equal(weights(first), weights(second))


def test_cache_of_other_data_is_refused(make_crm, arguments, splits, tmp_path):
    cache = TeacherCache.build(make_crm(1), splits["train"].select(range(10)), tmp_path / "cache")
    with pytest.raises(CacheError, match="data_hash"):
        train(make_crm(0), arguments(), splits, cache)


def test_a_wide_teacher_is_narrowed_to_teach(make_crm, arguments, splits):
    """Twelve items span eleven dimensions without their mean; what is left out is hardly noticed."""
    narrowed, whole = make_crm(0), make_crm(0)
    trainer = train(narrowed, arguments("narrowed", optim="sgd"), splits, make_crm(1, hidden_size=160))
    assert trainer._teacher_items.shape == (13, trainer._teacher_cache.manifest["hidden_size"])
    assert trainer._teacher_items.shape[1] <= 11
    trainer = train(
        whole, arguments("whole", optim="sgd", teacher_max_error=0.0), splits, make_crm(1, hidden_size=160)
    )
    assert trainer._teacher_items.shape == (13, 160)
    torch.testing.assert_close(weights(narrowed), weights(whole), atol=1e-4, rtol=1e-3)


def llm_arguments(tmp_path, **settings) -> MutualDistillArguments:
    settings = {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 1, **settings}
    return MutualDistillArguments(str(tmp_path / "llm"), **settings)


def test_a_crm_gives_the_llm_its_own_item_vectors_however_wide(make_crm, make_llm, splits, tmp_path, monkeypatch):
    """A narrow form would have other vectors, in another basis."""
    monkeypatch.setattr(teacher_cache, "EXACT_WIDTH", 4)
    llm, crm = make_llm(), make_crm(1)
    MutualDistillTrainer(llm, llm_arguments(tmp_path), splits["train"], teacher=crm).train()
    vectors = crm.item_matrix().detach()[1:]
    torch.testing.assert_close(llm.item_vectors[1:], vectors / vectors.square().mean().sqrt())


def test_a_narrowed_teacher_has_no_item_vectors_to_give(make_crm, make_llm, splits, tmp_path):
    cache = TeacherCache.build(make_crm(1, hidden_size=160), splits["train"], tmp_path / "cache", max_error=0.01)
    with pytest.raises(ConfigurationError, match="a narrowed teacher, without its own item vectors"):
        MutualDistillTrainer(make_llm(), llm_arguments(tmp_path), splits["train"], teacher=cache)
    args = llm_arguments(tmp_path, refresh_item_vectors=False)
    trainer = MutualDistillTrainer(make_llm(), args, splits["train"], teacher=cache)
    trainer.train()
    assert not trainer.model.item_vectors.any()


def test_loss_parts_are_logged(make_crm, arguments, splits):
    trainer = train(make_crm(0), arguments(logging_steps=5, kl_weight=0.5), splits, make_crm(1))
    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.5 * entry["kl"], rel=0.2)
    assert 0 <= entry["weight_mean"] <= 2
    assert 0 <= entry["agreement"] <= 1
    alone = train(make_crm(0), arguments("alone", logging_steps=5), splits).state.log_history[0]
    assert "cross_entropy" in alone
    assert "kl" not in alone


def test_evaluation_ranks_the_last_item_of_the_whole_row(make_crm, arguments, splits):
    """Against the plainest ranking: one row at a time, scores of all items, the whole history left out."""
    model = make_crm(3, max_length=3)
    trainer = CRMTrainer(model, arguments(per_device_eval_batch_size=7), eval_dataset=splits["test"])
    expected = []
    for row in splits["test"]:
        *history, target = row["item_ids"]
        with torch.no_grad():
            scores = model.eval().encode(torch.tensor([history[-3:]]))[0, -1] @ model.item_matrix().T
        others = [item for item in range(1, 13) if item != target and item not in history]
        expected.append(1 + sum(bool(scores[item] >= scores[target]) for item in others))
    output = trainer.predict(splits["test"])
    assert output.predictions.tolist() == expected
    assert output.label_ids.tolist() == [row["item_ids"][-1] for row in splits["test"]]
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(ranking_metrics(expected)["ndcg@10"])


def test_seen_items_can_be_kept(make_crm, arguments, splits):
    masked = CRMTrainer(make_crm(3), arguments(), eval_dataset=splits["test"]).predict(splits["test"])
    kept = CRMTrainer(make_crm(3), arguments(seen_items="keep"), eval_dataset=splits["test"]).predict(splits["test"])
    assert (kept.predictions >= masked.predictions).all()
    assert (kept.predictions > masked.predictions).any()


def test_a_student_may_begin_with_its_teachers_item_vectors(make_crm, make_llm, arguments, splits):
    args = arguments(learning_rate=0.0, num_train_epochs=1, init_item_vectors=True)
    trainer = train(make_crm(0), args, splits, teacher=make_llm(1))
    expected = trainer._teacher_cache.item_vectors(8)
    assert expected.any()
    assert torch.equal(trainer.model.item_matrix(), expected)
    alone = train(make_crm(0), args, splits)
    assert torch.equal(alone.model.item_matrix(), make_crm(0).item_matrix())


@pytest.mark.parametrize("kind", ["sasrec", "gru4rec", "recbole"])
def test_dropout_with_a_teacher_ends_with_the_training(kind, make_crm, arguments, splits):
    """Without any, a model draws no random number: two trainings with other draws before are the same."""
    settings = {"num_items": 12, "hidden_size": 8, "max_length": 6, "dropout": 0.5, "num_layers": 2}
    steps = {"num_train_epochs": 1, "per_device_train_batch_size": 40, "optim": "sgd", "learning_rate": 0.1}
    config, model_class = {
        "sasrec": (SASRecConfig, SASRecModel),
        "gru4rec": (GRU4RecConfig, GRU4RecModel),
        "recbole": (RecBoleSASRecConfig, RecBoleSASRecModel),
    }[kind]

    def trained(seed, teacher, **more) -> RecommenderModel:
        torch.manual_seed(0)
        model = model_class(config(**settings))
        # The seed is that of dropout alone: all rows are in one batch. Adam would enlarge what its order rounds off.
        args = arguments(str(seed), seed=seed, **steps, **more)
        train(model, args, splits, teacher)
        return model

    def same(first, second) -> bool:
        return torch.allclose(weights(first), weights(second), atol=1e-5)

    still = {"dropout_with_teacher": 0.0}
    assert same(trained(1, make_crm(1), **still), trained(2, make_crm(1), **still))
    assert not same(trained(1, make_crm(1)), trained(2, make_crm(1)))
    assert not same(trained(1, None, **still), trained(2, None, **still))
    # Afterwards the model's own is back.
    model = trained(1, make_crm(1), **still).train()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert not torch.equal(model.encode(ids), model.encode(ids))


@pytest.mark.parametrize("none", [0.0, 0])
def test_dropout_with_a_teacher_is_also_that_of_a_student_without_any(make_crm, arguments, splits, none):
    def trained(rate):
        model = make_crm(0, dropout=none)
        train(model, arguments(str(rate), num_train_epochs=1, dropout_with_teacher=rate), splits, make_crm(1))
        return model

    assert not torch.equal(weights(trained(0.5)), weights(trained(0.0)))
    assert trained(0.5).dropout.p == 0.0


def test_dropout_with_a_teacher_comes_where_the_model_has_one(make_crm, arguments, splits):
    """A GRU of several layers has a dropout between them, which is never on."""

    def trained(rate):
        torch.manual_seed(0)
        model = GRU4RecModel(GRU4RecConfig(num_items=12, hidden_size=8, num_layers=2, dropout=0.5))
        train(model, arguments(str(rate), num_train_epochs=1, dropout_with_teacher=rate), splits, make_crm(1))
        return weights(model)

    assert torch.equal(trained(0.5), trained(None))


def test_a_new_students_own_dropout_is_back_too(make_crm, arguments, splits):
    trainer = CRMTrainer(
        args=arguments(num_train_epochs=1, dropout_with_teacher=0.1),
        train_dataset=splits["train"],
        teacher=make_crm(1),
        model_init=lambda: make_crm(0, dropout=0.5),
    )
    trainer.train()
    assert trainer.model.dropout.p == 0.5


@pytest.mark.parametrize("rows", [100, 256])
def test_a_step_is_not_divided_by_rows_that_the_data_has_not(make_crm, arguments, splits, rows):
    """40 rows make one batch of 40, whatever more would fit."""
    students = make_crm(0), make_crm(0)
    for student, size in zip(students, (40, rows), strict=True):
        settings = {"per_device_train_batch_size": size, "optim": "sgd", "learning_rate": 0.5, "max_steps": 1}
        train(student, arguments(str(size), **settings), splits)
    torch.testing.assert_close(weights(students[1]), weights(students[0]))


@pytest.mark.parametrize(("together", "divisors"), [(True, (5, 1)), (False, (10, 2))])
def test_each_process_may_have_its_own_mean(make_crm, arguments, splits, monkeypatch, together, divisors):
    """The loss is multiplied by the number of processes, because gradients are averaged over them."""
    args = arguments(loss_normalization="batch", average_tokens_across_devices=together)
    trainer = CRMTrainer(make_crm(), args, splits["train"])
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    assert [float(trainer._loss_divisor(torch.ones(3), count)) for count in (5, torch.tensor(0))] == list(divisors)


@pytest.mark.parametrize(
    ("options", "function"),
    [
        ({"label_smoothing_factor": 0.1}, None),
        ({"neftune_noise_alpha": 5.0}, None),
        ({"eval_do_concat_batches": False}, None),
        ({"batch_eval_metrics": True}, None),
        ({}, "compute_loss_func"),
        ({}, "preprocess_logits_for_metrics"),
    ],
)
def test_what_would_have_no_effect_is_refused(make_crm, arguments, options, function):
    (name,) = options or [function]
    passed = {} if function is None else {function: lambda *_: 0}
    with pytest.raises(ConfigurationError, match=f"{name}.* has no meaning here"):
        CRMTrainer(make_crm(), arguments(**options), **passed)


def test_an_empty_training_set_is_named(make_crm, arguments, splits):
    with pytest.raises(ConfigurationError, match="The training set is empty"):
        CRMTrainer(make_crm(), arguments(), splits["train"].select([])).train()


def test_a_prediction_of_the_loss_alone(make_crm, arguments, splits):
    output = CRMTrainer(make_crm(), arguments(prediction_loss_only=True)).predict(splits["test"])
    assert output.predictions is None
    assert output.metrics["test_loss"] > 0


@pytest.mark.parametrize("teacher", ["runs/llm", nn.Linear(2, 2), lambda histories: None])
def test_a_teacher_of_another_kind_is_named(make_crm, arguments, splits, teacher):
    with pytest.raises(ConfigurationError, match="teacher must be a RecommenderModel .*ListedTeacherCache, got"):
        CRMTrainer(make_crm(), arguments(), splits["train"], teacher=teacher)


@pytest.mark.parametrize(("refresh", "warnings"), [(False, 1), (True, 0)])
def test_an_llm_that_cannot_tell_items_apart_is_warned_of(
    make_crm, make_llm, splits, tmp_path, monkeypatch, refresh, warnings
):
    said = []
    monkeypatch.setattr(mutual_distill_trainer.logger, "warning", said.append)
    llm = make_llm()
    llm.item_vectors.zero_()
    args = llm_arguments(tmp_path, refresh_item_vectors=refresh, max_steps=1)
    MutualDistillTrainer(llm, args, splits["train"], teacher=make_crm(1)).train()
    assert len([text for text in said if "neither item vectors nor titles" in text]) == warnings


def test_a_frozen_adapter_is_warned_of(make_llm, splits, tmp_path, monkeypatch):
    """As `from_pretrained` loads it: without a word head and projections alone would learn."""
    said = []
    monkeypatch.setattr(mutual_distill_trainer.logger, "warning", said.append)
    llm = make_llm(peft_config=LoraConfig(r=2))
    for frozen in (False, True):
        llm.backbone.requires_grad_(not frozen)
        MutualDistillTrainer(llm, llm_arguments(tmp_path, max_steps=1), splits["train"]).train()
        assert any("load a model with is_trainable=True" in text for text in said) is frozen


def test_a_second_adapter_is_refused_before_a_checkpoint_is(make_llm, splits, tmp_path):
    llm = make_llm(peft_config=LoraConfig(r=2))
    llm.backbone.add_adapter("second", LoraConfig(r=2))
    with pytest.raises(ConfigurationError, match=r"the adapters \['default', 'second'\], and one is saved"):
        MutualDistillTrainer(llm, llm_arguments(tmp_path), splits["train"]).train()


def test_data_of_another_catalogue_is_refused(make_crm, arguments, splits):
    with pytest.raises(ConfigurationError, match="holds the item id 12 and the student scores 5 items"):
        CRMTrainer(make_crm(num_items=5), arguments(), splits["train"]).train()
    trainer = CRMTrainer(make_crm(num_items=5), arguments(), splits["train"], splits["validation"])
    for measure in (trainer.evaluate, partial(trainer.predict, splits["validation"])):
        with pytest.raises(ConfigurationError, match="The evaluation set holds the item id 12 and the student scores"):
            measure()


@pytest.mark.parametrize(
    ("bf16", "slowdown", "warned"), [(True, 13.21, True), (True, 0.6, False), (False, 13.21, False)]
)
def test_slow_half_precision_is_warned_of(make_crm, arguments, splits, monkeypatch, bf16, slowdown, warned):
    said = []
    monkeypatch.setattr(trainer_module, "bf16_slowdown", lambda: slowdown)
    monkeypatch.setattr(trainer_module.logger, "warning_once", said.append)
    train(make_crm(0), arguments(bf16=bf16, max_steps=1), splits)
    assert ["in bf16 takes this processor 13.2 times as long" in text for text in said] == [True] * warned


@pytest.mark.parametrize("column", ["row_id", "length"])
def test_a_teacher_needs_to_know_the_rows(make_crm, arguments, splits, column):
    trainer = CRMTrainer(make_crm(), arguments(), splits["train"].remove_columns(column), teacher=make_crm(1))
    with pytest.raises(ConfigurationError, match="columns item_ids, row_id and length"):
        trainer.train()


def test_early_stopping(make_crm, arguments, splits):
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    args = arguments(
        num_train_epochs=50,
        learning_rate=0.0,
        early_stopping_patience=2,
        metric_for_best_model="ndcg@10",
        **settings,
    )
    assert train(make_crm(0), args, splits).state.epoch == 3


def test_early_stopping_needs_to_know_what_gets_better(make_crm, arguments, splits):
    for given in ({"eval_strategy": "epoch"}, {"metric_for_best_model": "ndcg@10"}):
        args = arguments(early_stopping_patience=2, **given)
        with pytest.raises(ConfigurationError, match="early_stopping_patience waits for a better metric_for_best"):
            train(make_crm(), args, splits)


def test_other_models_and_catalogues_are_refused(make_crm, arguments, splits, vocabulary):
    with pytest.raises(ConfigurationError, match="trains a RecommenderModel, got Linear"):
        CRMTrainer(nn.Linear(2, 2), arguments())
    with pytest.raises(ConfigurationError, match="OptimizedModule: give the model as it was before torch.compile"):
        CRMTrainer(torch.compile(make_crm(), backend="eager"), arguments())
    student = make_crm()
    student.vocabulary = ItemVocabulary(vocabulary.item_ids[:-1])
    with pytest.raises(ConfigurationError, match="The vocabulary holds 11 items and the model scores 12"):
        CRMTrainer(student, arguments(), splits["train"]).train()
    ensemble = RecommenderEnsemble([make_crm(0), make_crm(1)])
    with pytest.raises(ConfigurationError, match="An ensemble is not trained: train its members"):
        CRMTrainer(ensemble, arguments(), splits["train"]).train()
    with pytest.raises(ConfigurationError, match="The teacher scores 5 items and the student 12"):
        CRMTrainer(make_crm(), arguments(), splits["train"], teacher=make_crm(num_items=5))
    student, teacher = make_crm(0), make_crm(1)
    student.vocabulary = vocabulary
    teacher.vocabulary = ItemVocabulary([*vocabulary.item_ids[:-1], "other"])
    with pytest.raises(ConfigurationError, match="different item vocabularies.*other"):
        CRMTrainer(student, arguments(), splits["train"], teacher=teacher)
