# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from datasets import Dataset

from llmd4rec_hf import CRMArguments, ItemVocabulary, MutualDistillArguments
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.run_checks import check_run


KINDS = {"llm": MutualDistillArguments, "crm": CRMArguments}


@pytest.fixture
def check(make_llm, make_crm, splits, vocabulary):
    """Checks a run of tiny models that differs from a good one in what is given."""

    def check(models=None, args=None, sequences=None, fresh=(), **settings):
        """`settings` are those of a side's arguments, by `llm` and `crm`."""
        made = {side: kind("x", use_cpu=True, **settings.get(side, {})) for side, kind in KINDS.items()}
        check_run(
            {"llm": make_llm(), "crm": make_crm()} | (models or {}),
            made | (args or {}),
            {**splits, **(sequences or {})},
            vocabulary,
            fresh,
        )

    return check


def changed(split: Dataset, change) -> Dataset:
    """A split with the items of its first row changed."""
    first, *rest = split.to_list()
    return Dataset.from_list([first | {"item_ids": [change, *first["item_ids"][1:]]}, *rest], split.features)


@pytest.mark.parametrize("side", KINDS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"learning_rate": -1e-9}, "learning_rate must be at least 0, got -1e-09"),
        ({"num_train_epochs": -1}, "num_train_epochs must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"metric_for_best_model": "ndcg@7"}, "metric_for_best_model must be one of loss, hr@5, .*, got 'ndcg@7'"),
        ({"max_positions_per_batch": 5}, "max_positions_per_batch=5, but the longest history takes 6 positions"),
    ],
)
def test_arguments_that_would_end_a_later_phase(check, side, settings, message):
    with pytest.raises(ConfigurationError, match=f"{side}_args: {message}"):
        check(**{side: settings})


@pytest.mark.parametrize("side", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0.0, "weight_decay": 0.0},
        {"metric_for_best_model": "eval_ndcg@10"},
        {"metric_for_best_model": "loss"},
        {"max_positions_per_batch": 6},
        {"early_stopping_patience": 2},
    ],
)
def test_arguments_that_will_do(check, side, settings):
    check(**{side: settings})


def test_arguments_of_the_other_side(check):
    crm = CRMArguments("x", use_cpu=True)
    with pytest.raises(ConfigurationError, match="llm_args must be MutualDistillArguments, got CRMArguments"):
        check(args={"llm": crm})
    with pytest.raises(ConfigurationError, match="In a run MutualDistillationConfig.refresh decides"):
        check(llm={"refresh_item_vectors": False})


def test_a_reporter_that_cannot_be_had(check, monkeypatch):
    def missing():
        raise RuntimeError("it is not installed")

    monkeypatch.setattr("llmd4rec_hf.run_checks.get_reporting_integration_callbacks", lambda names: [missing])
    with pytest.raises(ConfigurationError, match=r"llm_args: report_to=.*: it is not installed"):
        check()


@pytest.mark.parametrize("num_items", [11, 13])
def test_models_over_another_number_of_items(check, make_crm, num_items):
    with pytest.raises(ConfigurationError, match=f"The CRM scores {num_items} items and the vocabulary holds 12"):
        check({"crm": make_crm(num_items=num_items)})


@pytest.mark.parametrize("width", [4, 16])
def test_item_vectors_of_another_width(check, make_crm, width):
    with pytest.raises(ConfigurationError, match=f"of width {width} and the LLM takes 8: .* item_dim={width}"):
        check({"crm": make_crm(hidden_size=width)})


def test_a_model_that_knows_the_items_by_other_numbers(check, make_crm, vocabulary):
    crm = make_crm()
    crm.vocabulary = ItemVocabulary(vocabulary.item_ids, ["other texts"] * 12)
    check({"crm": crm})
    crm.vocabulary = ItemVocabulary(vocabulary.item_ids[::-1])
    with pytest.raises(ConfigurationError, match="The CRM has another vocabulary than this run"):
        check({"crm": crm})


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_items_outside_of_the_vocabulary(check, splits, name):
    for item in (0, 13):
        message = f"The {name} sequences hold the item id {item}, outside of the vocabulary's 1..12"
        with pytest.raises(ConfigurationError, match=re.escape(message)):
            check(sequences={name: changed(splits[name], item)})
    check(sequences={name: changed(splits[name], 12)})


@pytest.mark.parametrize("column", ["item_ids", "row_id", "length"])
def test_columns_that_are_missing(check, splits, column):
    with pytest.raises(ConfigurationError, match=f"The validation sequences lack {column}"):
        check(sequences={"validation": splits["validation"].remove_columns(column)})
