# SPDX-License-Identifier: Apache-2.0
"""An exported graph says what the model says, for any number of histories of any length."""

from __future__ import annotations

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, set_seed

from llmd4rec_hf import (
    GRU4RecConfig,
    GRU4RecModel,
    ItemVocabulary,
    RecommenderEnsemble,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
)
from llmd4rec_hf.errors import ConfigurationError, StorageError
from llmd4rec_hf.export import export_model, pickles_in


MAX_LENGTH, NUM_ITEMS, K = 5, 30, 6
HISTORIES = {
    "one item": [[3]],
    "one history": [[3, 1, 4]],
    "as long as the model reads": [[1, 2, 3, 4, 5]],
    "longer than it reads": [[9, 8, 7, 6, 5, 4, 3, 2, 1]],
    "of all lengths": [[1], [2, 3], [4, 5, 6, 4], list(range(1, 30)), [30, 30]],
}


def sasrec():
    set_seed(0)
    model = SASRecModel(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, num_heads=2, max_length=MAX_LENGTH))
    model.vocabulary = ItemVocabulary(list(range(1, NUM_ITEMS + 1)))
    return model


def gru4rec():
    set_seed(0)
    model = GRU4RecModel(GRU4RecConfig(num_items=NUM_ITEMS, hidden_size=8, max_length=MAX_LENGTH))
    model.vocabulary = ItemVocabulary(list(range(1, NUM_ITEMS + 1)))
    return model


MODELS = {"sasrec": sasrec, "gru4rec": gru4rec}


@pytest.fixture(scope="module", params=["sasrec-onnx", "sasrec-torch", "gru4rec-onnx", "gru4rec-torch"])
def exported(request, tmp_path_factory):
    """`(model, folder, function from inputs to outputs)`."""
    kind, format = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[kind]()
    path = export_model(model, folder, format, k=K)
    if format == "torch":
        program = torch.export.load(path).module()
        return (
            model,
            folder,
            lambda **inputs: [
                output.detach().numpy() for output in program(**{name: torch.tensor(x) for name, x in inputs.items()})
            ],
        )
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return model, folder, lambda **inputs: session.run(None, inputs)


def pad(rows):
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, items in zip(padded, rows, strict=True):
        row[: len(items)] = items
    return padded


@pytest.mark.parametrize("filter_seen", [True, False], ids=["seen out", "seen in"])
@pytest.mark.parametrize("case", HISTORIES)
def test_parity_with_recommend(exported, case, filter_seen):
    model, _, run = exported
    histories = HISTORIES[case]
    seen = pad(histories) if filter_seen else np.zeros((len(histories), 1), np.int64)
    recommended, scores = run(item_ids=pad([row[-MAX_LENGTH:] for row in histories]), seen=seen)
    expected = model.recommend(histories, K, filter_seen=filter_seen)
    assert recommended.shape == scores.shape == (len(histories), K)
    for row, row_scores, ids, values in zip(recommended, scores, expected.ids, expected.scores, strict=True):
        assert row[: len(ids)].tolist() == ids
        np.testing.assert_allclose(row_scores[: len(ids)], values, atol=1e-5)
        # The history of 29 items leaves one.
        assert not row[len(ids) :].any()
        assert np.isneginf(row_scores[len(ids) :]).all()


def test_what_lies_beside_the_graph(exported):
    model, folder, _ = exported
    assert ItemVocabulary.from_pretrained(folder) == model.vocabulary
    facts = json.loads((folder / "export.json").read_text())
    assert (facts["k"], facts["max_length"], facts["num_items"]) == (K, MAX_LENGTH, NUM_ITEMS)
    assert facts["vocabulary"] == model.vocabulary.content_hash


def test_the_model_stays_as_it_was(tmp_path):
    model = sasrec().train()
    before = model.content_hash()
    export_model(model, tmp_path, "torch", k=1000)
    assert model.training
    assert model.content_hash() == before
    assert json.loads((tmp_path / "export.json").read_text())["k"] == NUM_ITEMS


def test_no_pickle_in_the_program(tmp_path):
    assert pickles_in(export_model(sasrec(), tmp_path, "torch")) == []
    torch.save({"weight": torch.ones(2)}, tmp_path / "weight.pt")
    found = tmp_path / "pickles.zip"
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr("text", "weights")
        archive.writestr("bare", pickle.dumps([1]))
        archive.write(tmp_path / "weight.pt", "saved")
    assert pickles_in(found) == ["bare", "saved"]


def test_a_torch_that_pickles_is_refused(tmp_path, monkeypatch):
    def save(program, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/serialized_state_dict.pt", b"PK")

    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(ConfigurationError, match="puts pickles into a program .*serialized_state_dict.pt"):
        export_model(sasrec(), tmp_path, "torch")
    assert not list(tmp_path.iterdir())


def test_hidden_states_alone_for_an_index(tmp_path):
    model = sasrec().eval()
    program = torch.export.load(export_model(model, tmp_path, "torch", k=None)).module()
    item_ids = pad([[1, 2, 3], [4]])
    items = np.load(tmp_path / "item_matrix.npy", allow_pickle=False)
    scores = program(item_ids=torch.tensor(item_ids)).detach().numpy() @ items.T
    expected = model.encode_last(torch.tensor(item_ids)) @ model.item_matrix().T
    np.testing.assert_allclose(scores, expected.detach().numpy(), atol=1e-5)


class AverageConfig(PreTrainedConfig):
    model_type = "test-average"

    def __init__(self, num_items=NUM_ITEMS, max_length=1, traceable=True, **kwargs):
        self.num_items, self.max_length, self.traceable = num_items, max_length, traceable
        super().__init__(**kwargs)


class AverageModel(RecommenderModel):
    """A user's own: the mean of the items so far."""

    config_class = AverageConfig

    def __init__(self, config):
        super().__init__(config)
        self.items = nn.Embedding(config.num_items + 1, 4)
        self.post_init()

    def item_matrix(self):
        return self.items.weight

    def encode(self, item_ids, attention_mask=None):
        if not self.config.traceable:
            item_ids = torch.tensor(item_ids.tolist())
        states = self.items(item_ids).cumsum(dim=1)
        return states / torch.arange(1, item_ids.shape[1] + 1)[:, None]


def test_a_model_of_ones_own_that_reads_one_item(tmp_path):
    model = AverageModel(AverageConfig())
    model.vocabulary = ItemVocabulary(list(range(1, NUM_ITEMS + 1)))
    program = torch.export.load(export_model(model, tmp_path, "torch", k=3)).module()
    recommended, _ = program(item_ids=torch.tensor([[5]]), seen=torch.tensor([[0]]))
    assert recommended.tolist() == model.recommend([[5]], 3, filter_seen=False).ids


def test_an_export_that_is_interrupted_leaves_nothing_that_is_served(tmp_path, monkeypatch):
    export_model(sasrec(), tmp_path, "torch", k=3)
    monkeypatch.setattr(ItemVocabulary, "save_pretrained", None)
    with pytest.raises(TypeError):
        export_model(sasrec(), tmp_path, k=3)
    assert not (tmp_path / "export.json").exists()


def test_what_cannot_be_exported(make_llm, make_crm, vocabulary, tmp_path):
    llm, misfit = make_llm(), sasrec()
    llm.vocabulary, misfit.vocabulary = vocabulary, ItemVocabulary([1, 2, 3])
    nameless, untraceable = sasrec(), AverageModel(AverageConfig(max_length=4, traceable=False))
    nameless.vocabulary = None
    untraceable.vocabulary = ItemVocabulary(list(range(1, NUM_ITEMS + 1)))
    for model, options, message in [
        (llm, {}, "deploy the CRM"),
        (RecommenderEnsemble([llm, make_crm()]), {}, "deploy the CRM"),
        (misfit, {}, "holds 3 items and the model scores"),
        (nameless, {}, "no item vocabulary"),
        (untraceable, {}, "AverageModel cannot be traced"),
        (sasrec(), {"k": 0}, "k must be at least 1"),
        (sasrec(), {"format": "tflite"}, "must be one of onnx, torch"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            export_model(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("something")
    with pytest.raises(StorageError, match=r"Cannot write to .*out \(.*Give a folder with room"):
        export_model(sasrec(), tmp_path / "out", k=3)
    assert (tmp_path / "out").read_text() == "something"
