# SPDX-License-Identifier: Apache-2.0
"""A SASRec that RecBole has trained scores here as it does there. The numbers come from RecBole itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmd4rec_hf import CRMArguments, CRMTrainer, ItemVocabulary, RecommenderModel
from llmd4rec_hf.errors import ConfigurationError, DataError
from llmd4rec_hf.models import RecBoleSASRecConfig, RecBoleSASRecModel


@pytest.fixture(scope="module")
def theirs() -> dict:
    return json.loads((Path(__file__).parent / "data" / "recbole_sasrec.json").read_text())


@pytest.fixture
def state(theirs) -> dict:
    return {name: torch.tensor(value) for name, value in theirs["state_dict"].items()}


@pytest.fixture
def vocabulary(theirs) -> ItemVocabulary:
    return ItemVocabulary(sorted(theirs["tokens"][1:], reverse=True))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_same_scores_as_in_recbole(theirs, state, vocabulary, tmp_path, ending):
    path = tmp_path / f"sasrec.{ending}"
    (torch.save if ending == "pt" else save_file)(state, path)
    model = RecBoleSASRecModel.from_recbole(path, theirs["tokens"], vocabulary)
    found = model.recommend(theirs["histories"], k=8, filter_seen=False)
    for ids, scores, row in zip(found.ids, found.scores, theirs["scores"], strict=True):
        expected = dict(zip(theirs["tokens"], row, strict=True))
        assert len(ids) == 8
        assert scores == pytest.approx([expected[item] for item in ids], abs=1e-6)
        assert ids == sorted(ids, key=expected.get, reverse=True)


def test_it_saves_trains_and_teaches(theirs, state, vocabulary, tmp_path):
    torch.save(state, tmp_path / "sasrec.pt")
    model = RecBoleSASRecModel.from_recbole(tmp_path / "sasrec.pt", theirs["tokens"], vocabulary, dropout=0.0)
    model.save_pretrained(tmp_path / "ours")
    again = RecommenderModel.from_pretrained(tmp_path / "ours")
    history = [theirs["histories"][0]]
    assert again.recommend(history) == model.recommend(history)

    from datasets import Dataset

    rows = Dataset.from_dict({"item_ids": [[1, 2, 3, 4], [5, 6, 7]], "row_id": [0, 1], "length": [4, 3]})
    student = RecBoleSASRecModel(RecBoleSASRecConfig(num_items=8, hidden_size=4, intermediate_size=6))
    before = student.content_hash()
    args = CRMArguments(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    CRMTrainer(student, args, rows, teacher=model).train()
    assert student.content_hash() != before


def test_what_does_not_fit(theirs, state, vocabulary, tmp_path):
    tokens, path = theirs["tokens"], tmp_path / "sasrec.pt"
    torch.save(state, path)
    with pytest.raises(DataError, match="padding included"):
        RecBoleSASRecModel.from_recbole(path, tokens[1:], vocabulary)
    with pytest.raises(DataError, match="first 'new'"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary.add(["new"]))
    with pytest.raises(ConfigurationError, match="must divide"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary, num_heads=3)
    with pytest.raises(ConfigurationError, match="hidden_act"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary, hidden_act="tanh")
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigurationError, match="holds no SASRec of RecBole"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary)
    torch.save({"config": Path("x")}, path, pickle_protocol=4)
    with pytest.raises(ConfigurationError, match="is not a plain state dict"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary)
    for name in ("LayerNorm.bias", "trm_encoder.layer.0.feed_forward.LayerNorm.bias"):
        torch.save({key: value for key, value in state.items() if key != name}, path)
        with pytest.raises(ConfigurationError, match=f"'{name}' is missing"):
            RecBoleSASRecModel.from_recbole(path, tokens, vocabulary)
    torch.save({**state, "LayerNorm.bias": torch.zeros(7)}, path)
    with pytest.raises(ConfigurationError, match="holds no SASRec of RecBole whose sizes fit"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary)
    torch.save(torch.zeros(1), path)
    with pytest.raises(ConfigurationError, match="is not a state dict but a Tensor"):
        RecBoleSASRecModel.from_recbole(path, tokens, vocabulary)


@pytest.mark.parametrize("name", ["nowhere.pt", "empty.pt", "torn.safetensors"])
def test_files_that_hold_nothing(theirs, vocabulary, tmp_path, name):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigurationError, match=f"{name} is not a plain state dict"):
        RecBoleSASRecModel.from_recbole(tmp_path / name, theirs["tokens"], vocabulary)
