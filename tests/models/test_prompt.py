# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmd4rec_hf.errors import ConfigurationError
from llmd4rec_hf.models import build_tiny_llm
from llmd4rec_hf.models.prompt import split_prompt


CHAT_TEMPLATE = (
    "{% for message in messages %}begin {{ message['role'] }} {{ message['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}begin assistant {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def chat_tokenizer(titles):
    _, tokenizer = build_tiny_llm([*titles, "begin end user system assistant next is"], hidden_size=8, num_layers=1)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def with_special_tokens(tokenizer):
    """Opens each text with [UNK] and closes it with [PAD], as BERT does with [CLS] and [SEP]."""
    special = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[UNK]",
        sep_token="[PAD]",
    )
    special.backend_tokenizer.post_processor = TemplateProcessing(
        single="[UNK] $A [PAD]", special_tokens=[("[UNK]", 1), ("[PAD]", 0)]
    )
    return special


@pytest.mark.parametrize(
    ("prompt", "before", "after"),
    [
        ("red boots {history} blue hat", "red boots", "blue hat"),
        ("  red boots  {history}  blue hat ", "red boots", "blue hat"),
        ("{history} blue", "", "blue"),
        ("red {history}", "red", ""),
        ("{history}", "", ""),
    ],
)
def test_the_prompt_is_split_at_the_history(tokenizer, prompt, before, after):
    assert split_prompt(prompt, tokenizer) == tuple(tokenizer(part)["input_ids"] for part in (before, after))


def test_special_tokens_open_the_prompt_but_do_not_close_it(tokenizer):
    red, blue = (tokenizer(word)["input_ids"] for word in ("red", "blue"))
    special = with_special_tokens(tokenizer)
    assert special("red")["input_ids"] == [1, *red, 0]
    assert split_prompt("red {history} blue", special) == ([1, *red], blue)


@pytest.mark.parametrize("prompt", ["no place for it", "", [{"role": "user", "content": "red boots"}]])
def test_no_place_for_the_history(chat_tokenizer, prompt):
    with pytest.raises(ConfigurationError, match=r"must contain '\{history\}', where the items go; got"):
        split_prompt(prompt, chat_tokenizer)


def test_a_chat(chat_tokenizer):
    messages = [{"role": "system", "content": "garden"}, {"role": "user", "content": "boots {history} next"}]
    expected = ("begin system garden end begin user boots", "next end begin assistant")
    assert split_prompt(messages, chat_tokenizer) == tuple(chat_tokenizer(part)["input_ids"] for part in expected)


def test_a_chat_whose_answer_has_begun(chat_tokenizer):
    messages = [{"role": "user", "content": "boots {history}"}, {"role": "assistant", "content": "next is"}]
    expected = ("begin user boots", "end begin assistant next is")
    assert split_prompt(messages, chat_tokenizer) == tuple(chat_tokenizer(part)["input_ids"] for part in expected)


def test_a_chat_writes_its_special_tokens_itself(chat_tokenizer):
    special = with_special_tokens(chat_tokenizer)
    special.chat_template = CHAT_TEMPLATE
    messages = [{"role": "user", "content": "boots {history} next"}]
    assert split_prompt(messages, special) == split_prompt(messages, chat_tokenizer)


def test_a_chat_without_a_template(tokenizer):
    with pytest.raises(ConfigurationError, match="this tokenizer has no chat template: give a text"):
        split_prompt([{"role": "user", "content": "{history}"}], tokenizer)


def test_messages_are_taken_by_the_recommender(make_llm, chat_tokenizer, batch):
    messages = [{"role": "user", "content": "boots {history} next"}]
    model = make_llm(tokenizer=chat_tokenizer, prompt=messages)
    assert (model.config.prefix_ids, model.config.suffix_ids) == split_prompt(messages, chat_tokenizer)
