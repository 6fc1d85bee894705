# SPDX-License-Identifier: Apache-2.0
"""Item titles as frozen features: each is encoded once by the backbone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging


MAX_TITLE_TOKENS = 64
_TITLES_PER_BATCH = 256


@torch.no_grad()
def encode_texts(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> torch.Tensor:
    """
    One feature vector per text: the mean of the backbone's last states over its tokens, standardised per dimension
    over the texts (states of language models share a large common part that would hide what tells titles apart).

    Args:
        backbone ([`~transformers.PreTrainedModel`]): the language model, without adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        texts (`Sequence[str]`): N texts; each is cut after 64 tokens.

    Returns:
        `torch.Tensor` of shape `(N, width)`, float32, on the backbone's device.
    """
    encoder = _text_encoder(backbone)
    tokens = tokenizer(list(texts), truncation=True, max_length=MAX_TITLE_TOKENS)["input_ids"]
    # Texts of like length share a batch, so that little is padding.
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    features = torch.zeros(len(tokens), backbone.config.hidden_size, device=backbone.device)
    batches = range(0, len(order), _TITLES_PER_BATCH)
    for start in logging.tqdm(batches, desc="Encoding item titles", leave=False):
        indices = order[start : start + _TITLES_PER_BATCH]
        features[indices] = _mean_states(encoder, [tokens[index] for index in indices])
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    return (features - mean) / deviation.clamp_min(1e-6)


def _mean_states(encoder: PreTrainedModel, tokens: list[list[int]]) -> torch.Tensor:
    # A text without a token (an empty title and no special tokens) gets padding alone, and the zero vector.
    width = max(1, max(map(len, tokens)))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=encoder.device)
    lengths = torch.tensor([len(row) for row in tokens], device=encoder.device)
    mask = (torch.arange(width, device=encoder.device) < lengths[:, None]).long()
    attended = mask.clone()
    attended[:, 0] = 1
    states = encoder(input_ids=ids, attention_mask=attended).last_hidden_state.float()
    return (states * mask.unsqueeze(-1)).sum(dim=1) / lengths.clamp_min(1).unsqueeze(-1)


def _text_encoder(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone as it reads text best: an encoder that was made causal for the histories reads both ways."""
    if not getattr(backbone.config, "is_decoder", False):
        return backbone.eval()
    config = copy.deepcopy(backbone.config)
    config.is_decoder = False
    encoder = AutoModel.from_config(config, dtype=backbone.dtype).to(backbone.device)
    encoder.load_state_dict(backbone.state_dict())
    return encoder.eval()
