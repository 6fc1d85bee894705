# SPDX-License-Identifier: Apache-2.0
"""The text around the history: a template, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError


DEFAULT_PROMPT = "A user chose these items, oldest first: {history} The next item is"
HISTORY = "{history}"


def split_prompt(
    prompt: str | Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """
    Token ids before and after the history.

    Args:
        prompt (`str` or `Sequence[dict]`): text with `{history}` in it; or messages as chat templates take them,
            `{"role": ..., "content": ...}`, one of them with `{history}` in it. Unless the last message is the
            assistant's, the turn is handed to the assistant.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the backbone's tokenizer.

    Returns:
        `tuple[list[int], list[int]]`: special tokens that open a text stay, those that close it do not.

    Raises:
        ConfigurationError: no `{history}`, or messages for a tokenizer without a chat template.
    """
    is_chat = not isinstance(prompt, str)
    before, marker, after = (_apply_chat_template(prompt, tokenizer) if is_chat else prompt).partition(HISTORY)
    if not marker:
        raise ConfigurationError(f"The prompt must contain '{HISTORY}', where the items go; got {prompt!r}.")
    # A chat template writes its special tokens itself.
    prefix = tokenizer(before.rstrip(), add_special_tokens=not is_chat)["input_ids"]
    while prefix and not is_chat and prefix[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        prefix.pop()
    # In a chat the white space at the end is the template's, and tells the assistant to begin.
    after = after if is_chat else after.rstrip()
    suffix = tokenizer(after, add_special_tokens=False)["input_ids"] if after.strip() else []
    return prefix, suffix


def _apply_chat_template(messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ConfigurationError("The prompt is a chat and this tokenizer has no chat template: give a text.")
    answered = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not answered, continue_final_message=answered
    )
