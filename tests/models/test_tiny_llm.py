# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from transformers import LlamaModel, PreTrainedTokenizerBase, set_seed

from llmd4rec_hf.models import build_tiny_llm


def test_sizes(titles):
    model, tokenizer = build_tiny_llm(titles, hidden_size=32, num_layers=3, vocabulary_size=40)
    assert isinstance(model, LlamaModel) and isinstance(tokenizer, PreTrainedTokenizerBase)
    assert model.config.hidden_size == 32
    assert len(model.layers) == 3
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) <= 40


def test_texts_are_read_without_unknown_tokens(titles):
    _, tokenizer = build_tiny_llm(titles)
    for text in [*titles, "Blue BOOTS", "duck on a hose"]:
        ids = tokenizer(text)["input_ids"]
        assert ids and tokenizer.unk_token_id not in ids and tokenizer.pad_token_id not in ids
    assert tokenizer("red boots")["input_ids"] == tokenizer("Red  Boots")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("qqq")["input_ids"]


def test_shared_words_share_tokens(titles):
    _, tokenizer = build_tiny_llm(titles)
    boots = tokenizer("boots")["input_ids"]
    assert boots == tokenizer("red leather boots")["input_ids"][-len(boots) :]


def test_repeatable(titles):
    def build():
        set_seed(5)
        return build_tiny_llm(titles, hidden_size=16)

    (first, tokenizer), (second, other) = build(), build()
    assert tokenizer.get_vocab() == other.get_vocab()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_saved_and_loaded(titles, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = build_tiny_llm(titles, hidden_size=16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "blue wool duck"
    encoded = tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")["input_ids"], encoded)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(encoded).last_hidden_state, model.eval()(encoded).last_hidden_state)


def test_one_title_is_enough():
    model, tokenizer = build_tiny_llm(["a"], hidden_size=8, num_layers=1)
    assert model(tokenizer("a", return_tensors="pt")["input_ids"]).last_hidden_state.shape == (1, 1, 8)
