# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from plain_llm import CLOSE

from llmd4rec_hf import ItemVocabulary, LLMRecommender
from llmd4rec_hf.errors import ConfigurationError, DataError
from llmd4rec_hf.models.item_text import encode_texts


@pytest.fixture
def trained(make_llm, titles):
    """A model with item text, trained for some steps: without a backbone of its own, or on an adapter."""

    def make(adapter: bool) -> LLMRecommender:
        model = make_llm(adapter=adapter, text=True)
        model.vocabulary = ItemVocabulary([f"i{number}" for number in range(12)], titles)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
        for _ in range(5):
            optimizer.zero_grad()
            model(ids, labels=ids.roll(-1, dims=1)).loss.backward()
            optimizer.step()
        return model.eval()

    return make


@torch.no_grad()
def scores(model, history):
    hidden = model.encode(torch.tensor([history]))
    return (hidden[0, -1] @ model.item_matrix().T)[1:]


@pytest.mark.parametrize("adapter", [True, False])
def test_a_cold_item_stands_beside_the_one_of_the_same_title(trained, titles, adapter):
    model = trained(adapter)
    before = scores(model, [3, 5])
    popular = int(before.argmax())
    model.add_items(["new", "other"], [titles[popular], "something else"])
    after = scores(model, [3, 5])
    assert torch.equal(after[:12], before), "known items keep their scores"
    torch.testing.assert_close(after[12], before[popular], atol=2e-2, rtol=2e-2)
    assert abs(after[13] - before[popular]) > abs(after[12] - before[popular])
    assert model.recommend([["i2", "i4"]], k=3, filter_seen=False).ids[0][:2] in (
        [f"i{popular}", "new"],
        ["new", f"i{popular}"],
    )
    # It is read in a history as that item is.
    torch.testing.assert_close(scores(model, [13, 5]), scores(model, [popular + 1, 5]), atol=5e-2, rtol=5e-2)


def test_features_of_later_titles_are_those_of_all_titles_together(trained, titles):
    """With an adapter, whatever it learned: as the plain backbone reads them, and standardised as the first ones."""
    model = trained(adapter=True)
    plain = trained(adapter=True).backbone.unload()
    texts = ["red garden hose", "wool sofa"]
    model.add_items(["a", "b"], texts)
    together = encode_texts(plain, model.tokenizer, [*titles, *texts])
    # Standardised over 14 titles instead of the first 12: a line in each dimension, found from the known ones.
    known, features = together[:12], model.item_text_features[1:13]
    slope = (features.std(dim=0) / known.std(dim=0)).nan_to_num(0)
    expected = (together[12:] - known.mean(dim=0)) * slope + features.mean(dim=0)
    torch.testing.assert_close(model.item_text_features[13:], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("adapter", [True, False])
def test_saved_and_loaded(trained, adapter, tmp_path):
    model = trained(adapter)
    model.add_items(["new"], ["blue rubber hose"])
    model.save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert loaded.config.num_items == 13
    assert torch.equal(scores(loaded, [13, 1]), scores(model, [13, 1]))
    best = loaded.recommend([["new", "i1"]], k=20, filter_seen=False).ids[0]
    assert len(best) == 13 and "new" in best
    assert loaded.recommend([["i1"]], candidates=["new"]).ids == [["new"]]


def test_errors(trained, make_llm):
    model = trained(adapter=True)
    before = model.content_hash()
    for arguments in [(["i3"], ["again"]), (["x", "y"], ["one text"]), (["x", "x"], ["one", "two"])]:
        with pytest.raises(DataError):
            model.add_items(*arguments)
    assert model.content_hash() == before
    model.vocabulary = None
    for other in (model, make_llm()):
        with pytest.raises(ConfigurationError, match="placed by their titles"):
            other.add_items(["x"], ["y"])


# --- known and new ones beside each other ----------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["adapter", "whole"])
def with_vocabulary(request, make_llm, titles):
    model = make_llm(adapter=request.param, text=True).eval()
    model.vocabulary = ItemVocabulary([f"B{number}" for number in range(1, 13)], titles)
    return model


@torch.no_grad()
def test_new_items_leave_the_known_ones(with_vocabulary, batch):
    model = with_vocabulary
    states, matrix, vocabulary = model.encode(batch["item_ids"]), model.item_matrix(), model.vocabulary
    model.add_items(["N1", "N2"], ["yellow boots", "a garden chair"])
    assert torch.equal(model.encode(batch["item_ids"]), states)
    torch.testing.assert_close(model.item_matrix()[:13], matrix, **CLOSE)
    assert model.config.num_items == model.vocabulary.num_items == 14
    assert model.vocabulary.item_ids == [*vocabulary.item_ids, "N1", "N2"]
    assert {len(table) for table in (model.item_vectors, model.item_text_features, model.item_head.weight)} == {15}
    assert model.item_head.weight.requires_grad


@torch.no_grad()
def test_new_items_are_recommended_and_read(with_vocabulary, titles, tmp_path):
    model = with_vocabulary
    model.add_items(["N1"], ["yellow boots"])
    found = model.recommend([["B1", "N1"], ["B2"]], candidates=["N1", "B3"])
    assert found.ids[0] == ["B3"] and sorted(found.ids[1]) == ["B3", "N1"]
    model.save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert loaded.recommend([["B1", "N1"], ["B2"]], candidates=["N1", "B3"]) == found


@torch.no_grad()
def test_a_new_item_of_a_known_title_is_read_as_the_known_one(with_vocabulary, titles):
    model = with_vocabulary
    model.add_items(["N1"], [titles[8]])
    features = model.item_text_features
    others = torch.cat([features[1:9], features[10:13]])
    assert torch.cdist(features[13:], features[9:10]).item() < 0.5 * torch.cdist(features[13:], others).min().item()
    # Nothing but a title makes it: what is learned per item comes from the items whose titles are alike.
    weights = (torch.nn.functional.cosine_similarity(features[13:], features[1:13]) / 0.05).softmax(dim=0)
    if model.has_adapter:
        torch.testing.assert_close(model.item_vectors[13], weights @ model.item_vectors[1:13], rtol=1e-3, atol=1e-3)


def test_titles_are_read_without_the_adapter(make_llm, titles):
    model = make_llm(adapter=True, text=True).eval()
    model.vocabulary = ItemVocabulary(list(range(1, 13)), titles)
    model.add_items([13], [titles[0]])
    torch.testing.assert_close(model.item_text_features[13], model.item_text_features[1], rtol=1e-3, atol=1e-3)


def test_new_items_need_titles_and_a_vocabulary(make_llm, titles):
    for text in (True, False):
        with pytest.raises(ConfigurationError, match="New items are placed by their titles"):
            make_llm(text=text).add_items(["N1"], ["yellow boots"])
    model = make_llm(text=True)
    model.vocabulary = ItemVocabulary(list(range(1, 13)), titles)
    for ids, texts in (([12], ["boots"]), ([13], ["boots", "hat"]), ([13, 13], ["boots", "hat"])):
        with pytest.raises(DataError):
            model.add_items(ids, texts)
    assert model.config.num_items == 12 and len(model.item_vectors) == 13


def test_items_added_in_half_precision(trained):
    model = trained(adapter=True).to(torch.bfloat16)
    model.add_items(["new"], ["wool sofa"])
    assert model.recommend([["i1", "new"]], k=2).ids[0]
