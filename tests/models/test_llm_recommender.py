# SPDX-License-Identifier: Apache-2.0
"""What the LLM recommender has beyond what `test_recommender.py` asks of every model."""

from __future__ import annotations

import pytest
import torch
from plain_llm import CLOSE, assert_is_the_plain_computation, trainable
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
)

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import LLMRecommender, LLMRecommenderConfig


def enable_checkpointing(model):
    # The older name is deprecated where the newer one is known.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


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
