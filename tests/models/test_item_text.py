# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from llmd4rec_hf.models import item_text
from llmd4rec_hf.models.item_text import average_of_alike, encode_more_texts, encode_texts, principal_item_vectors


@pytest.fixture(scope="module")
def backbone(tiny_folder):
    return AutoModel.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@torch.no_grad()
def by_definition(backbone, tokenizer, texts, max_tokens=64):
    """One text at a time, without padding."""
    features = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:max_tokens]
        if ids:
            features.append(backbone(torch.tensor([ids])).last_hidden_state[0].mean(dim=0))
        else:
            features.append(torch.zeros(backbone.config.hidden_size))
    features = torch.stack(features)
    return (features - features.mean(dim=0)) / features.std(dim=0, correction=0)


def bert(**options):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=200,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
            **options,
        )
    )
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 5, 256])
def test_by_definition(monkeypatch, backbone, tokenizer, titles, batch_size):
    monkeypatch.setattr(item_text, "_TITLES_PER_BATCH", batch_size)
    features = encode_texts(backbone, tokenizer, titles)
    torch.testing.assert_close(features, by_definition(backbone, tokenizer, titles), rtol=1e-3, atol=1e-4)
    assert features.dtype == torch.float32


def test_standardised_over_the_texts(backbone, tokenizer, titles):
    features = encode_texts(backbone, tokenizer, titles)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.square().mean(dim=0), torch.ones(16), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_texts_stays(backbone, tokenizer, titles):
    features = encode_texts(backbone, tokenizer, titles)
    torch.testing.assert_close(encode_texts(backbone, tokenizer, titles[::-1]), features.flip(0), rtol=1e-3, atol=1e-4)


def test_empty_texts(backbone, tokenizer, titles):
    texts = ["", *titles[:3], ""]
    features = encode_texts(backbone, tokenizer, texts)
    assert torch.equal(features[0], features[-1])
    torch.testing.assert_close(features, by_definition(backbone, tokenizer, texts), rtol=1e-3, atol=1e-4)
    assert encode_texts(backbone, tokenizer, ["", ""]).tolist() == [[0.0] * 16] * 2


def test_equal_texts_have_no_spread(backbone, tokenizer):
    features = encode_texts(backbone, tokenizer, ["red hat"] * 3)
    assert features.isfinite().all()
    assert features.abs().max() < 1


def test_long_texts_are_cut(backbone, tokenizer):
    long = "red hat " * 100
    assert len(tokenizer(long)["input_ids"]) > 64
    texts = [long, "blue chair", long + "green"]
    features = encode_texts(backbone, tokenizer, texts)
    assert torch.equal(features[0], features[2])
    torch.testing.assert_close(features, by_definition(backbone, tokenizer, texts), rtol=1e-3, atol=1e-4)


def test_half_precision_backbones(tiny_folder, tokenizer, titles, backbone):
    half = AutoModel.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    features = encode_texts(half, tokenizer, titles)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, encode_texts(backbone, tokenizer, titles), rtol=0, atol=0.3)


def test_an_encoder_made_causal_reads_titles_both_ways(tokenizer, titles):
    """Its first state, to which a causal model would give nothing of what follows, must see the whole title."""
    causal, free = bert(is_decoder=True), bert()
    expected = by_definition(free, tokenizer, titles)
    before = {name: value.clone() for name, value in causal.state_dict().items()}
    torch.testing.assert_close(encode_texts(causal, tokenizer, titles), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(by_definition(causal, tokenizer, titles), expected, atol=0.1)
    assert causal.config.is_decoder
    assert all(torch.equal(value, before[name]) for name, value in causal.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_is_left_as_it_was(tokenizer, titles, training):
    model = bert(is_decoder=True).train(training)
    causal = [getattr(module, "is_causal", None) for module in model.modules()]
    encode_texts(model, tokenizer, titles)
    assert all(module.training == training for module in model.modules())
    assert model.config.is_decoder
    assert [getattr(module, "is_causal", None) for module in model.modules()] == causal


def test_no_gradient_is_recorded(backbone, tokenizer, titles):
    assert not encode_texts(backbone, tokenizer, titles).requires_grad


# --- kept on disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def readings(monkeypatch):
    """How often titles are really read."""
    calls = []
    read = item_text._read
    monkeypatch.setattr(item_text, "_read", lambda *args: calls.append(args) or read(*args))
    return calls


def test_titles_are_read_once(readings, backbone, tokenizer, titles, tmp_path):
    folder = tmp_path / "new" / "cache"
    expected = encode_texts(backbone, tokenizer, titles)
    for _ in range(3):
        assert torch.equal(encode_texts(backbone, tokenizer, titles, folder), expected)
    assert len(readings) == 2
    assert [path.suffix for path in folder.iterdir()] == [".safetensors"]


def test_other_titles_weights_or_words_are_read_anew(readings, tiny_folder, backbone, tokenizer, titles, tmp_path):
    encode_texts(backbone, tokenizer, titles, tmp_path)
    encode_texts(backbone, tokenizer, titles[::-1], tmp_path)
    other = AutoModel.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.layers[0].mlp.up_proj.weight[0, 0] += 1
    encode_texts(other, tokenizer, titles, tmp_path)
    more = AutoTokenizer.from_pretrained(tiny_folder)
    more.add_tokens(["leather"])
    encode_texts(backbone, more, [title for title in titles if "leather" not in title], tmp_path)
    assert len(readings) == len(list(tmp_path.iterdir())) == 4


def test_the_recommender_keeps_titles(readings, make_llm, titles, tmp_path):
    models = [make_llm(adapter=True, text=True, item_text_cache=tmp_path) for _ in range(2)]
    assert len(readings) == 1
    assert torch.equal(models[0].item_text_features, models[1].item_text_features)


# --- titles that come later ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", [4, 256])
def test_further_texts_are_standardised_as_the_known_ones(monkeypatch, backbone, tokenizer, titles, sample):
    """As if mean and deviation had been kept, whether all known titles are read again or a few."""
    monkeypatch.setattr(item_text, "_TITLES_PER_BATCH", sample)
    texts = ["a red duck", titles[7], "garden boots"]
    more = encode_more_texts(backbone, tokenizer, texts, titles, encode_texts(backbone, tokenizer, titles))
    known, new = (item_text._read(backbone, item_text._tokens(tokenizer, part)) for part in (titles, texts))
    expected = (new - known.mean(dim=0)) / known.std(dim=0, correction=0)
    torch.testing.assert_close(more, expected, rtol=1e-2, atol=1e-2)
    assert not more.requires_grad


def test_a_single_known_text_tells_no_texts_apart(backbone, tokenizer):
    """Its own features are zeros, so a model has learned nothing about any."""
    known = encode_texts(backbone, tokenizer, ["a red duck"])
    more = encode_more_texts(backbone, tokenizer, ["garden boots"], ["a red duck"], known)
    assert torch.equal(more, torch.zeros_like(more))


# --- items that are alike --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_average_of_alike(monkeypatch, chunk):
    monkeypatch.setattr(item_text, "_COLD_ITEMS_PER_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    new, known, first, second = (
        torch.randn(*shape, generator=generator) for shape in [(3, 4), (5, 4), (5, 2), (5, 7)]
    )
    averages = average_of_alike(new, known, [first, second])
    for row, features in enumerate(new):
        cosines = torch.stack([torch.dot(features, other) / features.norm() / other.norm() for other in known])
        weights = torch.exp(cosines / 0.05)
        weights = weights / weights.sum()
        for average, table in zip(averages, (first, second), strict=True):
            torch.testing.assert_close(average[row], (weights[:, None] * table).sum(dim=0))


def test_an_equal_title_outweighs_all_others():
    known = torch.eye(3)
    (average,) = average_of_alike(torch.tensor([[0.0, 7.0, 0.0]]), known, [torch.tensor([[1.0], [2.0], [3.0]])])
    assert average.item() == pytest.approx(2, abs=1e-6)


def test_principal_item_vectors_of_points_on_two_axes():
    """Sizes 4 and 1 along two axes become 2 and 1 in proportion, and together the size that gives scores of 2 nats."""
    features = torch.tensor([[4.0, 1.0, 5.0], [-4.0, 1.0, 5.0], [4.0, -1.0, 5.0], [-4.0, -1.0, 5.0]])
    vectors = principal_item_vectors(features, 4)
    assert vectors.shape == (5, 4)
    assert vectors[0].abs().max() == 0
    size = 2 / 5**0.5
    torch.testing.assert_close(vectors[1:, :2].abs(), torch.tensor([[2 * size, size]]).expand(4, 2))
    assert vectors[:, 2:].abs().max() == 0
    # Alike where the features are alike.
    torch.testing.assert_close(vectors[1:, 0].sign() * vectors[1, 0].sign(), features[:, 0].sign())


def test_principal_item_vectors_of_features_that_say_nothing():
    assert principal_item_vectors(torch.ones(5, 3), 2).abs().max() == 0
    assert principal_item_vectors(torch.randn(5, 8), 2).shape == (6, 2)
