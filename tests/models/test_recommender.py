# SPDX-License-Identifier: Apache-2.0
"""What every recommender must keep to, and what all of them get from the base class."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from llmd4rec_hf.data import ItemVocabulary, SequenceCollator
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import GRU4RecModel, RecommenderModel, RecommenderOutput, SASRecConfig, SASRecModel


AUTO_MODEL_TAKES_ADAPTERS = Version(transformers.__version__) >= Version("5.4")


# Shapes choose the order in which products are summed up; nothing else may tell two computations of a state apart.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@torch.no_grad()
def encode(model, ids, mask=None):
    return model.encode(torch.tensor(ids), None if mask is None else torch.tensor(mask))


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_weights_that_are_missing_or_damaged_are_named(make_crm, tmp_path):
    make_crm().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigurationError, match=f"Cannot load a recommender from '{tmp_path}'"):
        RecommenderModel.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ConfigurationError, match="model.safetensors"):
        RecommenderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_items": 0}, "num_items must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"hidden_size": -4}, "hidden_size must be at least 1, got -4"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"num_heads": 0}, r"num_heads \(0\) must divide"),
    ],
)
def test_sizes_that_no_model_has(sizes, message):
    with pytest.raises(ConfigurationError, match=message):
        SASRecModel(SASRecConfig(**{"num_items": 5, **sizes}))


def test_shapes(kind, still_model, batch, sizes):
    model = still_model(kind)
    matrix = model.item_matrix()
    assert matrix.shape[0] == sizes.num_items + 1
    assert model.encode(batch["item_ids"], batch["attention_mask"]).shape == (4, 5, matrix.shape[1])
    assert model.encode_last(batch["item_ids"], batch["attention_mask"]).shape == (4, matrix.shape[1])


@pytest.mark.parametrize("position", [0, 2, 4])
def test_no_state_depends_on_a_later_item(kind, still_model, position):
    model = still_model(kind)
    ids = [[3, 1, 4, 1, 5]]
    changed = [list(ids[0])]
    changed[0][position] = 9
    before, after = encode(model, ids)[0], encode(model, changed)[0]
    assert torch.equal(before[:position], after[:position])
    # And each later one does depend on it: the test would see a leak.
    assert ((before[position:] - after[position:]).abs().amax(dim=1) > 1e-3).all()


def test_no_state_depends_on_its_neighbours(kind, still_model):
    model = still_model(kind)
    first = encode(model, [[3, 1, 4], [9, 2, 6], [5, 5, 0]])
    second = encode(model, [[7, 8, 0], [9, 2, 6], [12, 1, 10]])
    assert torch.equal(first[1], second[1])


def test_no_state_depends_on_the_batch_or_its_padding(kind, still_model):
    model = still_model(kind)
    rows = [[3, 1, 4, 1, 5, 9, 2], [9, 2], [12], [6, 5, 3, 8]]
    width = max(map(len, rows))
    together = encode(model, [row + [0] * (width - len(row)) for row in rows])
    for row, states in zip(rows, together, strict=True):
        alone = encode(model, [row])[0]
        torch.testing.assert_close(states[: len(row)], alone, **CLOSE)
        padded = encode(model, [row + [0] * (width - len(row))])[0, : len(row)]
        torch.testing.assert_close(padded, alone, **CLOSE)


def test_the_mask_is_optional(kind, still_model, batch):
    model = still_model(kind)
    real = batch["attention_mask"].bool()
    with_mask = model.encode(batch["item_ids"], batch["attention_mask"])[real]
    assert torch.equal(model.encode(batch["item_ids"])[real], with_mask)


def test_encode_last(kind, still_model, batch):
    model = still_model(kind)
    states = model.encode(batch["item_ids"], batch["attention_mask"])
    expected = torch.stack([states[0, 4], states[1, 1], states[2, 0], states[3, 3]])
    torch.testing.assert_close(model.encode_last(batch["item_ids"], batch["attention_mask"]), expected, **CLOSE)
    torch.testing.assert_close(model.encode_last(batch["item_ids"]), expected, **CLOSE)


def test_the_items_matter(kind, still_model):
    model = still_model(kind)
    assert model.item_matrix()[1:].var(dim=0).min() > 1e-4
    states = encode(model, [[item] for item in range(1, model.config.num_items + 1)])[:, 0]
    assert torch.pdist(states).min() > 1e-3


# --- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [None, 5, torch.tensor(20)], ids=["mean", "int", "tensor"])
def test_loss_is_cross_entropy_over_the_items(kind, still_model, batch, divisor):
    model = still_model(kind)
    output = model(**batch, num_items_in_batch=divisor)
    keep = batch["labels"] != -100
    scores = (output.hidden @ output.item_matrix.T)[keep][:, 1:]
    expected = F.cross_entropy(scores, batch["labels"][keep] - 1, reduction="sum")
    torch.testing.assert_close(output.loss, expected / (11 if divisor is None else int(divisor)))


def test_forward_without_labels(kind, still_model, batch):
    model = still_model(kind)
    labels = batch.pop("labels")
    output = model(**batch, row_id=torch.arange(4))
    assert isinstance(output, RecommenderOutput)
    assert output.loss is None
    assert torch.equal(output.item_matrix, model.item_matrix())
    assert output.hidden.shape[:2] == labels.shape


def test_last_only(kind, still_model, batch):
    model = still_model(kind)
    del batch["labels"]
    assert torch.equal(model(**batch, last_only=True).hidden, model.encode_last(**batch))


def test_rows_of_some_items(kind, still_model, batch):
    model = still_model(kind)
    del batch["labels"]
    items = torch.tensor([3, 1, 3])
    output = model(**batch, items=items)
    assert torch.equal(output.item_matrix, model.item_matrix()[items])
    assert torch.equal(output.hidden, model.encode(**batch))


def test_a_tied_embedding_gives_sparse_gradients_if_asked(crm_kind, make_model, batch):
    model = make_model(crm_kind)
    dense = make_model(crm_kind)
    assert model.tied_embedding is model.item_embedding
    del batch["labels"]
    model.tied_embedding.sparse = True
    for one in (model, dense):
        output = one(**batch, items=torch.tensor([3, 1, 3]))
        (output.hidden.sum() + output.item_matrix.square().sum()).backward()
    assert model.item_embedding.weight.grad.is_sparse
    torch.testing.assert_close(model.item_embedding.weight.grad.to_dense(), dense.item_embedding.weight.grad)


def test_an_llm_has_no_tied_embedding(llm_kind, still_model):
    assert still_model(llm_kind).tied_embedding is None


def test_training_lowers_the_loss_and_reaches_every_weight(kind, make_model, batch):
    model = make_model(kind)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    first = model(**batch).loss
    first.backward()
    # What a tiny batch cannot reach: words that no prompt holds are looked up, not left out.
    without = [name for name, parameter in trainable.items() if parameter.grad is None or not parameter.grad.any()]
    assert not without
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    optimizer.step()
    assert model(**batch).loss < first


def test_the_padding_row_is_not_trained(crm_kind, make_model, batch):
    model = make_model(crm_kind)
    model(**batch).loss.backward()
    assert not model.item_matrix()[0].any()
    assert not model.item_embedding.weight.grad[0].any()


def test_batches_of_the_collator_fit(kind, still_model):
    model = still_model(kind)
    rows = [{"item_ids": [1, 2, 3], "row_id": 0}, {"item_ids": list(range(1, 13)), "row_id": 1}]
    output = model(**SequenceCollator(model.config.max_length)(rows))
    assert output.hidden.shape[:2] == (2, 7)
    assert output.loss.isfinite()


def test_what_a_trainer_looks_for(kind, still_model):
    model = still_model(kind)
    assert list(inspect.signature(type(model).forward).parameters)[1:4] == ["item_ids", "attention_mask", "labels"]
    assert model.accepts_loss_kwargs
    assert model.main_input_name == "item_ids"
    assert model.config.keys_to_ignore_at_inference == ["hidden", "item_matrix"]


# --- files -----------------------------------------------------------------------------------------------------------


def assert_same_model(loaded, model, batch):
    assert torch.equal(loaded.item_matrix(), model.item_matrix())
    for name in ("encode", "encode_last"):
        arguments = batch["item_ids"], batch["attention_mask"]
        assert torch.equal(getattr(loaded, name)(*arguments), getattr(model, name)(*arguments))
    assert loaded.content_hash() == model.content_hash()


def test_saved_and_loaded_it_is_the_same(kind, still_model, batch, tmp_path):
    model = still_model(kind)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(module.training for module in loaded.modules())
    assert_same_model(loaded, model, batch)
    names = inspect.signature(type(model.config).__init__).parameters.keys() - {"self", "kwargs"}
    assert len(names) >= 5
    saved, found = ({name: getattr(each.config, name) for name in names} for each in (model, loaded))
    assert found == json.loads(json.dumps(saved))


@pytest.mark.parametrize("sizes", [("50GB", "1KB"), ("1KB", "50GB")])
@pytest.mark.parametrize("kind_of_both", ["sasrec", "llm-lora"])
def test_saved_over_another_model_it_is_what_is_found(kind_of_both, make_model, batch, tmp_path, sizes):
    for seed, size in enumerate(sizes):
        model = make_model(kind_of_both, seed=seed).eval()
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert_same_model(RecommenderModel.from_pretrained(tmp_path), model, batch)


def test_a_variant_lies_beside_the_model(make_model, tmp_path):
    model, half = make_model("sasrec"), make_model("sasrec").half()
    model.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path, variant="fp16")
    assert SASRecModel.from_pretrained(tmp_path, dtype=torch.float32).content_hash() == model.content_hash()
    assert SASRecModel.from_pretrained(tmp_path, variant="fp16").content_hash() == half.content_hash()


def test_auto_classes(kind, still_model, batch, tmp_path):
    model = still_model(kind)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    if "lora" in kind and not AUTO_MODEL_TAKES_ADAPTERS:
        pytest.skip("this release of transformers takes such a folder for its base model")
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same_model(loaded, model, batch)


@pytest.mark.parametrize("ids", [list(range(100, 112)), [f"B{number:02}" for number in range(12)]], ids=["int", "str"])
def test_the_vocabulary_travels_with_the_model(make_model, titles, tmp_path, ids):
    for kind in ("sasrec", "llm-lora"):
        model = make_model(kind)
        model.vocabulary = ItemVocabulary(ids, titles)
        model.save_pretrained(tmp_path / kind)
        loaded = type(model).from_pretrained(tmp_path / kind)
        assert loaded.vocabulary == model.vocabulary
        assert loaded.recommend([ids[:2]], k=3).ids == model.recommend([ids[:2]], k=3).ids
        if kind == "sasrec" or AUTO_MODEL_TAKES_ADAPTERS:
            assert AutoModel.from_pretrained(tmp_path / kind).vocabulary == model.vocabulary


def test_no_vocabulary_is_fine(crm_kind, still_model, tmp_path):
    still_model(crm_kind).save_pretrained(tmp_path)
    assert type(still_model(crm_kind)).from_pretrained(tmp_path).vocabulary is None


def test_a_vocabulary_of_another_size_is_refused(crm_kind, still_model, tmp_path):
    model = still_model(crm_kind)
    model.save_pretrained(tmp_path)
    ItemVocabulary(list(range(11))).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="holds 11 items and the model scores 12"):
        type(model).from_pretrained(tmp_path)


def test_weights_of_another_kind_are_refused(still_model, tmp_path):
    """Else what is missing would be drawn at random."""
    still_model("sasrec").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="do not fit a GRU4RecModel: missing keys"):
        GRU4RecModel.from_pretrained(tmp_path)
    still_model("llm-lora").save_pretrained(tmp_path / "llm")
    with pytest.raises(ConfigurationError, match="not found in the base model.*finds the right kind"):
        SASRecModel.from_pretrained(tmp_path / "llm")
    model, info = SASRecModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, SASRecModel)
    assert not info["missing_keys"]


def test_only_the_main_process_writes(kind, still_model, tmp_path):
    model = still_model(kind)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*"))


def test_a_given_state_is_saved(kind, make_model, tmp_path):
    """As FSDP and DeepSpeed do: the model's own tensors are not what is to be written."""
    model, other = make_model(kind), make_model(kind, seed=1)
    assert model.content_hash() != other.content_hash()
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert type(model).from_pretrained(tmp_path).content_hash() == other.content_hash()


def test_load_weights_in_place(kind, make_model, batch, tmp_path):
    model, other = make_model(kind).eval(), make_model(kind, seed=1).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    identities = [id(parameter) for parameter in model.parameters()]
    other.save_pretrained(tmp_path)
    model.load_weights(tmp_path)
    assert_same_model(model, other, batch)
    assert [id(parameter) for parameter in model.parameters()] == identities


def test_content_hash_changes_with_any_saved_value(kind, make_model, tmp_path):
    model = make_model(kind)
    first = model.content_hash()
    assert first == model.eval().content_hash() == make_model(kind).content_hash()
    assert len(first) == 64
    hashes = {first}
    for value in model.portable_state().values():
        last = value.view(-1)[-1:]
        kept = last.clone()
        last.add_(0.5)
        hashes.add(model.content_hash())
        last.copy_(kept)
    assert len(hashes) == 1 + len(model.portable_state())
    assert model.content_hash() == first


def test_content_hash_sees_names_shapes_and_dtypes(make_model, monkeypatch):
    model = make_model("sasrec")
    hashes = set()
    for state in (
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(8, dtype=torch.bfloat16)},
        {"a": torch.tensor(0.0)},
        {"a": torch.tensor(True)},
        {"a": torch.zeros(0)},
    ):
        monkeypatch.setattr(model, "portable_state", lambda state=state: state)
        hashes.add(model.content_hash())
    assert len(hashes) == 8
    transposed = {"a": torch.arange(6.0).view(2, 3).T}
    monkeypatch.setattr(model, "portable_state", lambda: transposed)
    first = model.content_hash()
    transposed["a"] = transposed["a"].contiguous()
    assert model.content_hash() == first


def test_portable_state_is_what_is_written(crm_kind, still_model, tmp_path):
    model = still_model(crm_kind)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.portable_state().keys()


def test_what_a_subclass_must_implement():
    config = PreTrainedConfig()
    for name in ("num_items", "max_length"):
        with pytest.raises(ConfigurationError, match=f"PreTrainedConfig has no {name}, which every recommender needs"):
            RecommenderModel(config)
        setattr(config, name, 5)
    model = RecommenderModel(config)
    with pytest.raises(NotImplementedError, match="RecommenderModel must implement `encode`"):
        model.encode(torch.tensor([[1]]))
    with pytest.raises(NotImplementedError, match="RecommenderModel must implement `item_matrix`"):
        model.item_matrix()


def test_other_item_vectors(make_crm):
    model = make_crm(0)
    vectors = torch.ones_like(model.item_matrix())
    model.set_item_vectors(vectors)
    assert model.item_matrix()[1:].eq(1).all()
    assert not model.item_matrix()[0].any()
    with pytest.raises(ConfigurationError, match="of shape"):
        model.set_item_vectors(vectors[:, :3])


def test_other_item_vectors_need_an_embedding(make_crm, monkeypatch):
    model = make_crm(0)
    monkeypatch.setattr(type(model), "item_matrix", lambda self: self.item_embedding.weight * 2)
    with pytest.raises(ConfigurationError, match="implement `set_item_vectors`"):
        model.set_item_vectors(model.item_matrix())
