# SPDX-License-Identifier: Apache-2.0
"""What the LLM recommender has beyond what `test_recommender.py` asks of every model."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from llmd4rec_hf.data import ItemVocabulary
from llmd4rec_hf.errors import ConfigurationError, DataError
from llmd4rec_hf.models import LLMRecommender, LLMRecommenderConfig


CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def enable_checkpointing(model):
    # The older name is deprecated where the newer one is known.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def soft_tokens(model, item_ids):
    tokens = model.input_projection(model.item_vectors[item_ids])
    if model.config.item_text:
        tokens = tokens + model.item_text_features[item_ids] @ model.input_text_projection.weight.T
    return tokens


def words(model, ids):
    return model.backbone.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))


def plain_encode(model, item_ids, attention_mask):
    """Prefix, items and (where it is read) suffix in one row each, without a cache."""
    if model.config.supervision == "all_positions":
        prefix = words(model, model.config.prefix_ids).expand(len(item_ids), -1, -1)
        inputs = torch.cat([prefix, soft_tokens(model, item_ids)], dim=1)
        return model.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, prefix.shape[1] :]
    rows = []
    for ids, length in zip(item_ids, attention_mask.sum(dim=1).tolist(), strict=True):
        states = []
        for end in range(1, length + 1):
            parts = [words(model, model.config.prefix_ids), soft_tokens(model, ids[:end])]
            inputs = torch.cat([*parts, words(model, model.config.suffix_ids)])
            states.append(model.backbone(inputs_embeds=inputs[None], use_cache=False).last_hidden_state[0, -1])
        states += [torch.zeros_like(states[0])] * (len(ids) - length)
        rows.append(torch.stack(states))
    return torch.stack(rows)


def assert_is_the_plain_computation(model, batch):
    """Values and gradients of every trainable weight."""
    item_ids, mask = batch["item_ids"], batch["attention_mask"]
    keep = mask.bool()
    direction = torch.randn(1, generator=torch.Generator().manual_seed(1))
    results = []
    for encode in (model.encode, lambda *arguments: plain_encode(model, *arguments)):
        hidden = encode(item_ids, mask)[keep]
        weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden) * direction
        loss = (hidden * weights).sum() + hidden.square().mean()
        wanted = {name: value for name, value in trainable(model).items() if "head" not in name}
        results.append((hidden, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)))
    (hidden, grads), (expected, expected_grads) = results
    torch.testing.assert_close(hidden, expected, **CLOSE)
    for name, grad, value in zip(wanted, grads, expected_grads, strict=True):
        if grad is None:
            assert value is None or not value.any(), name
        else:
            scale = value.abs().max().item()
            torch.testing.assert_close(grad, value, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


# --- computation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_shared_prefix_is_plain_concatenation(make_model, batch, llm_kind, training):
    assert_is_the_plain_computation(make_model(llm_kind).train(training), batch)


def test_activation_checkpointing_changes_nothing(make_model, batch, llm_kind):
    model = make_model(llm_kind)
    enable_checkpointing(model)
    assert model._checkpoints_activations()
    assert_is_the_plain_computation(model, batch)
    assert_is_the_plain_computation(model.eval(), batch)


@pytest.mark.parametrize("prompt", ["{history}", "a user chose {history}", "{history} the next item is"])
@pytest.mark.parametrize("supervision", ["all_positions", "last_position"])
def test_prompts_with_a_part_missing(make_llm, batch, supervision, prompt):
    model = make_llm(prompt=prompt, supervision=supervision)
    assert bool(model.config.prefix_ids) == (not prompt.startswith("{"))
    assert bool(model.config.suffix_ids) == (not prompt.endswith("}"))
    assert_is_the_plain_computation(model, batch)


def test_the_prompt_matters_where_it_is_read(make_llm, batch):
    def encode(**options):
        with torch.no_grad():
            return make_llm(**options).encode(batch["item_ids"], batch["attention_mask"])

    one, two = "a user {history} the next", "wool hat {history} the next"
    for mode in ("all_positions", "last_position"):
        assert not torch.allclose(
            encode(prompt=one, supervision=mode), encode(prompt=two, supervision=mode), atol=1e-2
        )
    other_suffix = "a user {history} blue"
    assert torch.equal(encode(prompt=one), encode(prompt=other_suffix))
    first, second = (encode(prompt=prompt, supervision="last_position") for prompt in (one, other_suffix))
    assert not torch.allclose(first, second, atol=1e-2)


def test_item_text_joins_the_item_matrix(make_llm):
    model = make_llm(text=True)
    expected = model.item_head.weight + model.item_text_features @ model.head_text_projection.weight.T
    torch.testing.assert_close(model.item_matrix(), expected)
    assert not model.item_text_features[0].any()
    assert model.item_text_features[1:].std() > 0.9
    plain = make_llm()
    assert plain.item_matrix() is plain.item_head.weight


def test_title_features_are_frozen(make_llm, batch):
    model = make_llm(text=True, adapter=True)
    assert not model.item_text_features.requires_grad and not model.item_vectors.requires_grad
    model(**batch).loss.backward()
    assert model.head_text_projection.weight.grad.any() and model.input_text_projection.weight.grad.any()


def test_dropout_in_training_alone(make_llm, batch):
    model = make_llm(dropout=0.5)
    assert not torch.equal(model.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    model.eval()
    assert torch.equal(model.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


def test_a_half_precision_backbone(make_llm, batch):
    """Heads and scores stay in float32, so that small updates are not lost and ranks do not tie."""
    model, full = (make_llm(adapter=True, text=True, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {value.dtype for name, value in trainable(model).items()} == {torch.float32}
    assert model.backbone.dtype == torch.bfloat16
    output = model(**batch)
    assert output.hidden.dtype == output.item_matrix.dtype == torch.float32
    output.loss.backward()
    assert all(value.grad.isfinite().all() for value in trainable(model).values())
    assert output.loss.item() == pytest.approx(full(**batch).loss.item(), rel=0.2)


def test_autocast(make_llm, batch):
    model = make_llm(adapter=True)
    expected = model(**batch).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=0.2)


# --- the traps of wrapping a backbone --------------------------------------------------------------------------------


def test_the_backbone_keeps_its_attention(make_llm, tiny_folder):
    """A configuration shared with the wrapper has its attention reset, and the backbone is no longer causal."""
    backbone = AutoModel.from_pretrained(tiny_folder)
    before = backbone.config._attn_implementation
    model = make_llm(backbone=backbone, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    assert model.backbone is backbone
    assert model.backbone.config._attn_implementation == before is not None
    assert isinstance(model.config.backbone_config, dict)
    tokens, changed = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 8]])
    states, others = (model.backbone(input_ids=ids).last_hidden_state[0] for ids in (tokens, changed))
    assert torch.equal(states[:2], others[:2])
    assert not torch.allclose(states[2], others[2], atol=1e-2)


@pytest.mark.parametrize("adapter", [True, False])
def test_loaded_models_keep_their_attention(make_llm, tmp_path, adapter):
    make_llm(adapter=adapter).save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert loaded.backbone.config._attn_implementation is not None


def test_the_backbones_weights_survive_the_constructor(make_llm, tiny_folder):
    """`post_init` draws weights anew that it takes for uninitialised."""
    saved = load_file(tiny_folder / "model.safetensors")
    backbone = AutoModel.from_config(AutoConfig.from_pretrained(tiny_folder))
    backbone.load_state_dict(saved)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for model in (make_llm(), make_llm(text=True), make_llm(backbone=backbone, tokenizer=tokenizer)):
        assert all(torch.equal(value, saved[name]) for name, value in model.backbone.state_dict().items())


def test_a_new_adapter_changes_nothing(make_llm, batch):
    with_adapter, without = make_llm(adapter=True, awake=False), make_llm(awake=False)
    lora_b = {name: value for name, value in with_adapter.named_parameters() if "lora_B" in name}
    assert len(lora_b) == 8
    assert not any(value.any() for value in lora_b.values())
    with_adapter.load_state_dict(without.state_dict(), strict=False)
    states, expected = (model.eval().encode(batch["item_ids"]) for model in (with_adapter, without))
    torch.testing.assert_close(states, expected, **CLOSE)


def test_what_is_trained(make_llm):
    own = {"input_projection.weight", "input_projection.bias", "item_head.weight"}
    text = {"input_text_projection.weight", "head_text_projection.weight"}
    names = set(trainable(make_llm(adapter=True, text=True)))
    assert own | text == {name for name in names if not name.startswith("backbone.")}
    assert all("lora_" in name for name in names - own - text)
    model = make_llm()
    assert set(trainable(model)) == {name for name, _ in model.named_parameters()}
    assert own < set(trainable(model))


def test_new_models_start_quietly(make_llm, batch, sizes):
    """Soft tokens are as large as words, and the first loss is that of a uniform guess."""
    model = make_llm(awake=False, text=True)
    model.set_item_vectors(torch.randn(sizes.num_items + 1, sizes.item_dim))
    size, expected = (
        values.square().mean().sqrt().item()
        for values in (model.input_projection(model.item_vectors[1:]), model.token_embedding.weight)
    )
    assert size == pytest.approx(expected, rel=0.5)
    assert model(**batch).loss.item() == pytest.approx(torch.tensor(12.0).log().item(), rel=0.1)


# --- item vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 500.0])
def test_item_vectors_are_brought_to_unit_size(make_llm, random_vectors, scale):
    model, vectors = make_llm(), random_vectors(seed=5)
    given = scale * vectors
    given[0] = 1e6
    model.set_item_vectors(given.requires_grad_())
    assert model.item_vectors[1:].square().mean().item() == pytest.approx(1)
    assert not model.item_vectors[0].any()
    torch.testing.assert_close(
        torch.nn.functional.normalize(model.item_vectors[1:]), torch.nn.functional.normalize(vectors[1:])
    )
    assert not model.item_vectors.requires_grad
    assert given[0, 0].item() == 1e6, "the CRM's own table must not change"


def test_item_vectors_change_what_is_read(make_llm, random_vectors, batch):
    model = make_llm()
    before = model.encode(batch["item_ids"])
    model.set_item_vectors(random_vectors(seed=6))
    assert not torch.allclose(model.encode(batch["item_ids"]), before, atol=1e-2)


def test_item_vectors_of_zeros(make_llm, sizes):
    model = make_llm()
    model.set_item_vectors(torch.zeros(sizes.num_items + 1, sizes.item_dim))
    assert not model.item_vectors.any()


@pytest.mark.parametrize("shape", [(12, 6), (13, 5), (14, 6)])
def test_item_vectors_of_another_shape(make_llm, shape):
    with pytest.raises(
        ConfigurationError, match=rf"shape \({shape[0]}, {shape[1]}\) .* takes \(13, 6\): .*item_dim={shape[1]}"
    ):
        make_llm().set_item_vectors(torch.zeros(shape))


# --- files -----------------------------------------------------------------------------------------------------------

OWN_TENSORS = {"input_projection.weight", "input_projection.bias", "item_head.weight", "item_vectors"}
TEXT_TENSORS = {
    "input_text_projection.weight",
    "head_text_projection.weight",
    "item_text_features",
}


@pytest.mark.parametrize("text", [True, False])
def test_files_with_an_adapter(make_llm, titles, tmp_path, text):
    model = make_llm(adapter=True, text=text)
    model.vocabulary = ItemVocabulary(list(range(12)), titles)
    model.save_pretrained(tmp_path)
    own, adapter = (load_file(tmp_path / f"{name}.safetensors") for name in ("model", "adapter_model"))
    assert set(own) == OWN_TENSORS | (TEXT_TENSORS if text else set()), "no base weights"
    assert len(adapter) == 16
    assert all(name.startswith("base_model.model.layers.") and ".lora_" in name for name in adapter)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "adapter_config.json", "vocabulary.json", "tokenizer.json"}
    assert "README.md" not in names, "PEFT's card would claim the whole repository"


def test_files_without_an_adapter(make_llm, tmp_path):
    model = make_llm()
    model.save_pretrained(tmp_path)
    backbone = {f"backbone.{name}" for name in model.backbone.state_dict()}
    assert set(load_file(tmp_path / "model.safetensors")) == OWN_TENSORS | backbone
    assert not list(tmp_path.glob("adapter*"))


def test_the_adapter_loads_on_the_bare_backbone(make_llm, tiny_folder, tmp_path):
    model = make_llm(adapter=True).eval()
    model.save_pretrained(tmp_path)
    bare = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_folder), tmp_path).eval()
    tokens = torch.tensor([[5, 6, 7]])
    states, plain = bare(tokens).last_hidden_state, AutoModel.from_pretrained(tiny_folder)(tokens).last_hidden_state
    assert torch.equal(states, model.backbone(tokens).last_hidden_state)
    assert not torch.allclose(states, plain, atol=1e-2)


def test_a_loaded_adapter_is_the_saved_one(make_llm, tmp_path):
    model = make_llm(adapter=True)
    model.save_pretrained(tmp_path)
    loaded = dict(LLMRecommender.from_pretrained(tmp_path).named_parameters())
    saved = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert len(saved) == 16 and all(value.any() for value in saved.values())
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


@pytest.mark.parametrize("is_trainable", [True, False])
def test_adapters_are_loaded_for_training_on_demand(make_llm, batch, tmp_path, is_trainable):
    make_llm(adapter=True).save_pretrained(tmp_path)
    model = LLMRecommender.from_pretrained(tmp_path, is_trainable=is_trainable)
    assert any("lora_" in name for name in trainable(model)) == is_trainable
    assert {"item_head.weight", "input_projection.weight"} < set(trainable(model))
    model.train()(**batch).loss.backward()


def test_saving_again_what_was_loaded(make_llm, tmp_path):
    make_llm(adapter=True, text=True).save_pretrained(tmp_path / "first")
    model = LLMRecommender.from_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    assert LLMRecommender.from_pretrained(tmp_path / "second").content_hash() == model.content_hash()


@pytest.mark.parametrize("adapter", [True, False])
def test_the_tokenizer_travels_with_the_model(make_llm, tmp_path, adapter):
    model = make_llm(adapter=adapter)
    model.save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    text = "green garden hose"
    assert loaded.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]


def test_without_an_adapter_nothing_but_the_folder_is_needed(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base").eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    loaded = LLMRecommender.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


def test_a_base_that_is_gone(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base", adapter=True).eval()
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigurationError, match="Cannot load the language model '.*base'"):
        LLMRecommender.from_pretrained(tmp_path / "model")
    for backbone in (tiny_folder, AutoModel.from_pretrained(tiny_folder)):
        loaded = LLMRecommender.from_pretrained(tmp_path / "model", backbone=backbone)
        assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.bfloat16), ("bfloat16", torch.bfloat16), ("auto", torch.float32)],
)
def test_precision_of_the_loaded_backbone(make_llm, batch, tmp_path, adapter, dtype, expected):
    make_llm(adapter=adapter).save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.backbone.dtype == expected
    assert loaded.item_head.weight.dtype == torch.float32
    assert loaded(**batch).loss.isfinite()


@pytest.mark.parametrize("adapter", [True, False])
def test_a_file_that_does_not_fit(make_llm, tmp_path, adapter):
    model = make_llm(adapter=adapter)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors.pop("item_head.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    for load in (LLMRecommender.from_pretrained, model.load_weights):
        with pytest.raises(ConfigurationError, match=r"does not fit this model: missing \['item_head.weight'\]"):
            load(tmp_path)
    save_file(tensors | {"item_head.weight": head, "stray": head.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"unexpected \['stray'\]"):
        LLMRecommender.from_pretrained(tmp_path)


def test_another_catalogue(make_llm, tmp_path):
    make_llm(adapter=True).save_pretrained(tmp_path)
    config = LLMRecommenderConfig.from_pretrained(tmp_path)
    config.num_items += 1
    with pytest.raises(ConfigurationError, match=r"(?s)model.safetensors does not fit this model: .*item_head.weight"):
        LLMRecommender.from_pretrained(tmp_path, config=config)


def test_a_whole_model_is_not_loaded_in_fewer_bits(make_llm, tmp_path):
    make_llm().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="saved with its whole backbone, without an adapter"):
        LLMRecommender.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_content_hash_is_of_what_is_trained(make_llm):
    """Frozen base weights are not saved, and not hashed: for a large base that would take minutes per round."""
    model = make_llm(adapter=True)
    first = model.content_hash()
    with torch.no_grad():
        next(parameter for parameter in model.backbone.parameters() if not parameter.requires_grad).add_(1)
    assert model.content_hash() == first
    whole = make_llm()
    first = whole.content_hash()
    with torch.no_grad():
        whole.token_embedding.weight[3, 3] += 1
    assert whole.content_hash() != first


# --- new items -------------------------------------------------------------------------------------------------------


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


# --- merging ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_merging_the_adapter(tiny_folder, make_llm, batch, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "base")
    model = make_llm(backbone=tmp_path / "base", adapter=True, text=True).eval()
    expected, matrix = model.encode(batch["item_ids"]), model.item_matrix()
    assert model.merge_and_unload() is model
    assert not model.has_adapter
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model.encode(batch["item_ids"]), expected, rtol=1e-3, atol=1e-4)
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "merged")
    loaded = LLMRecommender.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded.encode(batch["item_ids"]), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(loaded.item_matrix(), matrix)


def test_merging_without_an_adapter(make_llm):
    model = make_llm()
    before = model.content_hash()
    assert model.merge_and_unload().content_hash() == before


# --- what cannot be built --------------------------------------------------------------------------------------------


def bert(**options):
    return BertModel(
        BertConfig(
            vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **options
        )
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "no place for it"}, r"must contain '\{history\}', where the items go; got 'no place for it'"),
        ({"item_texts": ["a", "b"]}, "item_texts holds 2 texts for 12 items"),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, "Quantised weights cannot be trained"),
        ({"supervision": "first_position"}, "supervision must be one of all_positions, last_position"),
        ({"backbone": "/no/such/folder"}, "Cannot load the tokenizer '/no/such/folder': give a folder or a Hub id"),
    ],
)
def test_errors(tiny_folder, options, message):
    with pytest.raises(ConfigurationError, match=message):
        LLMRecommender.from_backbone(**{"backbone": tiny_folder, "num_items": 12} | options)


def test_unusable_backbones(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    decoder = AutoModel.from_pretrained(tiny_folder)
    adapted = get_peft_model(AutoModel.from_pretrained(tiny_folder), LoraConfig(target_modules=["q_proj"]))
    for backbone, message in [
        (bert(), "BertModel is not causal: a later token changes earlier states. Give a decoder"),
        (
            LlamaForCausalLM(decoder.config),
            r"LlamaForCausalLM is not a bare backbone: .*without head \(its `.base_model`\)",
        ),
        (adapted, "PeftModel.* is not a bare backbone: .*without adapter, which goes into `peft_config`"),
        (torch.nn.Linear(1, 1), "Linear is not a bare backbone"),
        ("/no/such/folder", "Cannot load the language model '/no/such/folder': give a folder or a Hub id"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            LLMRecommender.from_backbone(backbone, 12, tokenizer=tokenizer)


def test_a_folder_that_holds_something_else(tiny_folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="Cannot load the language model"):
        LLMRecommender.from_backbone(tmp_path, 12, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))


@pytest.mark.parametrize("training", [True, False])
def test_the_causality_check_leaves_the_mode(make_llm, tiny_folder, training):
    backbone = AutoModel.from_pretrained(tiny_folder).train(training)
    model = LLMRecommender.from_backbone(backbone, 12, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    assert model.backbone.training == training


# --- other decoders --------------------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    # Shorter than the prompt: the cached prefix slides out of the window.
    "mistral": _GROUPED | {"sliding_window": 4},
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "gemma3_text": _GROUPED | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "phi3": _GROUPED,
    "gpt_neox": _SIZES,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bert": _SIZES | {"is_decoder": True},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_folder, awaken, prompt):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    dropouts = {"dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout_prob": 0.0}
    settings = FAMILIES[request.param] | special | {"max_position_embeddings": 64}
    config = AutoConfig.for_model(request.param, **settings)
    for name, value in (dropouts | {"attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}).items():
        if hasattr(config, name):
            setattr(config, name, value)
    model = LLMRecommender.from_backbone(AutoModel.from_config(config), 12, 6, tokenizer=tokenizer, prompt=prompt)
    # As the backbone reads them: some families scale what their table holds.
    words = model.token_embedding(torch.arange(len(tokenizer)))
    model.set_item_vectors(torch.randn(13, 6))
    first_sizes = [values.square().mean().sqrt().item() for values in (soft_tokens(model, range(1, 13)), words)]
    model = awaken(model)
    model.first_sizes = first_sizes
    return model


def test_families_are_causal_and_do_not_mix_rows(family):
    family.eval()
    with torch.no_grad():
        whole = family.encode(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]]))
        changed = family.encode(torch.tensor([[3, 1, 4, 7, 5], [9, 2, 0, 0, 0]]))
        alone = family.encode(torch.tensor([[9, 2]]))
    assert torch.equal(whole[0, :3], changed[0, :3])
    assert not torch.allclose(whole[0, 3:], changed[0, 3:], atol=1e-3)
    assert torch.equal(whole[1], changed[1])
    torch.testing.assert_close(whole[1, :2], alone[0], **CLOSE)


def test_families_read_soft_tokens_of_the_size_of_words(family):
    soft, word = family.first_sizes
    assert soft == pytest.approx(word, rel=0.5)


@pytest.mark.parametrize("supervision", ["all_positions", "last_position"])
def test_families_compute_what_plain_concatenation_does(family, batch, supervision):
    family.config.supervision = supervision
    try:
        assert_is_the_plain_computation(family.train(), batch)
    finally:
        family.config.supervision = "all_positions"


def test_families_are_saved_and_loaded(family, batch, tmp_path):
    family.eval().save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert type(loaded.backbone) is type(family.backbone)
    assert torch.equal(loaded.encode(batch["item_ids"]), family.encode(batch["item_ids"]))


def test_families_learn(family, batch):
    family.train()
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = family(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_title_vectors_are_a_crms_to_begin_with(make_llm, titles):
    """Two dimensions more than the features have: those are zero. What training changes has no part in them."""
    model = make_llm(text=True)
    vectors = model.title_vectors()
    assert vectors.shape == (len(titles) + 1, model.config.item_dim)
    assert torch.equal(make_llm(1, text=True, awake=False).title_vectors(), vectors)
    width = model.item_text_features.shape[1]
    wide = model.title_vectors(width + 2)
    assert wide[:, width:].abs().max() == 0
    # All components: what is far apart as features is far apart as vectors.
    distances, features = (torch.cdist(x[1:], x[1:]).flatten() for x in (wide, model.item_text_features))
    assert torch.corrcoef(torch.stack([distances, features]))[0, 1] > 0.8
    with pytest.raises(ConfigurationError, match="build it with item_texts"):
        make_llm().title_vectors()


# --- pretrained models -----------------------------------------------------------------------------------------------

PRETRAINED = {"minilm-l6-v2": ["query", "value"], "stories260k": ["q_proj", "v_proj"]}


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_models(shared, name, titles, random_vectors, batch, tmp_path):
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"shared holds no {name}")
    torch.manual_seed(0)
    peft_config = LoraConfig(r=4, target_modules=PRETRAINED[name])
    model = LLMRecommender.from_backbone(folder, 12, 6, item_texts=titles, peft_config=peft_config)
    model.set_item_vectors(random_vectors())
    # What the titles mean shows in their features: boots are closer to boots than to a hose.
    features = torch.nn.functional.normalize(model.item_text_features[1:], dim=1)
    assert features[0] @ features[1] > features[0] @ features[4]

    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-4)
    model.eval()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]

    with torch.no_grad():
        states = model.encode(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 0, 0, 0]]))
        changed = model.encode(torch.tensor([[3, 1, 4, 7, 5], [9, 2, 0, 0, 0]]))
        torch.testing.assert_close(model.encode(torch.tensor([[9, 2]]))[0], states[1, :2], rtol=1e-3, atol=1e-4)
        assert torch.equal(states[0, :3], changed[0, :3])
        assert not torch.allclose(states[0, 3:], changed[0, 3:], atol=1e-4)
        model.save_pretrained(tmp_path)
        loaded = LLMRecommender.from_pretrained(tmp_path)
        assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 2_000_000


# --- configuration ---------------------------------------------------------------------------------------------------


def test_configuration_by_itself():
    config = LLMRecommenderConfig(num_items=3, prefix_ids=(1, 2), backbone_config={"model_type": "llama"})
    assert config.prefix_ids == [1, 2] and config.suffix_ids == []
    assert config.supervision == "all_positions"
    assert (config.item_dim, config.max_length, config.item_text) == (64, 50, False)


def test_files_of_a_later_release():
    with pytest.raises(ConfigurationError, match="format version 2 and this release reads up to 1: update"):
        LLMRecommenderConfig(num_items=3, format_version=2)


def test_a_model_of_random_weights_from_its_configuration(make_llm, batch):
    config = make_llm(text=True).config
    model = LLMRecommender(config).eval()
    assert model(**batch).loss.isfinite()
    assert not model.has_adapter
