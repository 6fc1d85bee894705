# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.metadata
from importlib.metadata import PackageNotFoundError

import pytest
from datasets import Dataset

from llmd4rec_hf import ItemVocabulary, run_results
from llmd4rec_hf.run_results import assemble_results, dataset_entry, late_gain, rounds_of


def record(value: float, distillation: dict | None = None) -> dict:
    """What a phase leaves behind."""
    return {"validation": {"ndcg@10": value}, "seconds": 10 * value, "distillation": distillation}


PHASES = {
    "0-crm-distilled": record(0.1),
    "1-llm-distilled": record(0.2, {"kl": 0.5}),
    "1-crm-distilled": record(0.3, {"kl": 0.4}),
    "1-llm-control": record(0.4),
    "1-crm-control": record(0.5),
}


def assemble(phases: dict, has_controls: bool) -> dict:
    return assemble_results(phases, {}, dataset={}, protocol={}, settings={}, seed=7, has_controls=has_controls)


def test_rounds_by_hand():
    def measured(value):
        return {"validation": {"ndcg@10": value}, "test": None}

    results = assemble(PHASES, has_controls=True)
    # Both arms begin with one warm-up, which has no teacher.
    assert results["rounds"] == [
        {
            "round": 0,
            "crm": measured(0.1),
            "llm": None,
            "crm_control": measured(0.1),
            "llm_control": None,
            "distillation": {"crm": None, "llm": None},
        },
        {
            "round": 1,
            "crm": measured(0.3),
            "llm": measured(0.2),
            "crm_control": measured(0.5),
            "llm_control": measured(0.4),
            "distillation": {"crm": {"kl": 0.4}, "llm": {"kl": 0.5}},
        },
    ]
    assert results["seconds"] == {name: 10 * phase["validation"]["ndcg@10"] for name, phase in PHASES.items()}


def test_a_run_without_controls_has_none_in_any_round():
    phases = {name: phase for name, phase in PHASES.items() if "control" not in name}
    entries = assemble(phases, has_controls=False)["rounds"]
    assert [entry[key] for entry in entries for key in ("crm_control", "llm_control")] == [None] * 4


def test_rounds_are_in_the_order_of_their_numbers():
    names = ["10-crm-distilled", "9-crm-distilled", "11-llm-distilled", "12-crm-control"]
    assert rounds_of(dict.fromkeys(names, {}), "crm") == [9, 10]


def test_what_there_is_to_say_about_the_data():
    test = Dataset.from_dict({"item_ids": [[1, 2, 3], [4, 1]], "length": [3, 2], "row_id": [0, 1]})
    vocabulary = ItemVocabulary(["a", "b", "c", "d"])
    entry = dataset_entry(test, vocabulary, "walk", None)
    assert len(entry.pop("hash")) == 64
    assert entry == {"name": "walk", "users": 2, "items": 4, "interactions": 5, "test_rows": 2}
    # Who was filtered out of the splits is known from the log alone; what was tested is not for others to say.
    known = dataset_entry(test, vocabulary, "walk", {"users": 9, "density": 0.5, "test_rows": 9})
    assert (known["users"], known["density"], known["test_rows"]) == (9, 0.5, 2)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([0.1, 0.2, 0.25], 0.25),
        ([0.1, 0.2, 0.15], 0.0),
        # Of twenty the last two.
        ([*[0.1] * 17, 0.2, 0.22, 0.21], 0.1),
        ([0.2], None),
        ([], None),
        ([0.0, 0.2], None),
    ],
)
def test_how_far_validation_rose_at_the_end(history, expected):
    assert late_gain(history) == pytest.approx(expected)


def test_a_folder_of_numbas_name_is_no_version_of_it(monkeypatch):
    def version(name):
        if name == "numba":
            raise PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(run_results, "version", version)
    assert {"torch", "numpy"} <= set(run_results._versions()) - {"numba"} == set(run_results._versions())
