# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from llmd4rec_hf import LLMRecommender
from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models.prompt import split_prompt


TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} </{{ message.role }}> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "system", "content": "a garden chair"},
    {"role": "user", "content": "a user chose these items {history} the next item is"},
]


@pytest.fixture
def tokenizer(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def words(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text(tokenizer):
    prefix, suffix = split_prompt("a user {history} the next", tokenizer)
    assert (prefix, suffix) == (words(tokenizer, "a user"), words(tokenizer, " the next"))
    assert split_prompt("{history}", tokenizer) == ([], [])


def test_a_chat_hands_the_turn_over(tokenizer):
    prefix, suffix = split_prompt(CHAT, tokenizer)
    assert prefix == words(tokenizer, "<system> a garden chair </system> <user> a user chose these items")
    assert suffix == words(tokenizer, " the next item is </user> <assistant> ")


def test_a_chat_that_begins_the_answer(tokenizer):
    messages = [{"role": "user", "content": "{history}"}, {"role": "assistant", "content": "the next item is"}]
    prefix, suffix = split_prompt(messages, tokenizer)
    assert prefix == words(tokenizer, "<user>")
    assert suffix == words(tokenizer, " </user> <assistant> the next item is")


def test_a_recommender_on_a_chat(make_llm, tokenizer, batch, tmp_path):
    model = make_llm(prompt=CHAT, tokenizer=tokenizer, supervision="last_position").eval()
    plain = make_llm(supervision="last_position").eval()
    assert model.config.suffix_ids[: len(plain.config.suffix_ids)] == plain.config.suffix_ids
    assert not torch.allclose(model.encode(batch["item_ids"]), plain.encode(batch["item_ids"]))
    model.save_pretrained(tmp_path)
    loaded = LLMRecommender.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(batch["item_ids"]), model.encode(batch["item_ids"]))
    assert loaded.tokenizer.chat_template == TEMPLATE


def test_errors(tiny_folder, tokenizer):
    with pytest.raises(ConfigurationError, match="no chat template"):
        split_prompt(CHAT, AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(ConfigurationError, match=r"must contain '\{history\}'"):
        split_prompt(CHAT[:1], tokenizer)
