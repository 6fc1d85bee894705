# SPDX-License-Identifier: Apache-2.0
"""A small decoder made on the spot, so that everything can be tried without a download."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast


def build_tiny_llm(
    texts: Sequence[str], *, hidden_size: int = 128, num_layers: int = 2, vocabulary_size: int = 2000
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A Llama of random weights and a byte-pair tokenizer trained on the given texts.

    It has read nothing, so it knows no more than which titles share words; what it stands in for is a real language
    model. Draw its weights under `set_seed` for a repeatable run.

    Args:
        texts (`Sequence[str]`): item titles; the prompt's words should be among them.
        hidden_size (`int`, *optional*, defaults to 128): width of the model.
        num_layers (`int`, *optional*, defaults to 2): transformer layers.
        vocabulary_size (`int`, *optional*, defaults to 2000): tokens at most.

    Returns:
        `tuple` of the [`~transformers.LlamaModel`] and its tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=fast.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaModel(config), fast
