# SPDX-License-Identifier: Apache-2.0
"""Item titles as frozen features: each is encoded once by the backbone, and kept on disk if wished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distillation.low_rank import reduce_teacher
from ..files import whole_file
from ..modes import changed, evaluating
from .weights import hash_tensors


MAX_TITLE_TOKENS = 64
_TITLES_PER_BATCH = 256
# How much more alike a title must be, in cosine, to count e times as much for a cold item.
_LIKENESS_TEMPERATURE = 0.05
_COLD_ITEMS_PER_CHUNK = 256
# Of scores, in nats, of a CRM that begins with titles.
_BEGINNING_SPREAD = 2.0


@torch.no_grad()
def encode_texts(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    cache_directory: str | os.PathLike | None = None,
) -> torch.Tensor:
    """
    One feature vector per text: the mean of the backbone's last states over its tokens, standardised per dimension
    over the texts (states of language models share a large common part that would hide what tells titles apart).

    Args:
        backbone ([`~transformers.PreTrainedModel`]): the language model, without adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        texts (`Sequence[str]`): N texts; each is cut after 64 tokens.
        cache_directory (`str`, *optional*): where the result is kept, under a name that is a hash of all it follows
            from (the backbone's weights and configuration and the texts' tokens): what is found needs no check.

    Returns:
        `torch.Tensor` of shape `(N, width)`, float32, on the backbone's device.
    """
    tokens = _tokens(tokenizer, texts)
    path = None if cache_directory is None else Path(cache_directory, f"{_content_key(backbone, tokens)}.safetensors")
    if path is not None and path.is_file():
        return load_file(path)["item_text_features"].to(backbone.device)
    features = _standardised(_read(backbone, tokens))
    if path is not None:
        with whole_file(path) as partial:
            save_file({"item_text_features": features.cpu()}, partial)
    return features


def _standardised(states: torch.Tensor) -> torch.Tensor:
    mean, deviation = states.mean(dim=0), states.std(dim=0, correction=0)
    return (states - mean) / deviation.clamp_min(1e-6)


@torch.no_grad()
def encode_more_texts(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    known_texts: Sequence[str],
    known_features: torch.Tensor,
) -> torch.Tensor:
    """
    Features of further texts, standardised as those of the known texts were.

    Args:
        backbone ([`~transformers.PreTrainedModel`]): the language model that read the known texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        texts (`Sequence[str]`): M further texts.
        known_texts (`Sequence[str]`): N known texts, of which some are read again.
        known_features (`torch.Tensor` of shape `(N, width)`): what [`encode_texts`] gave for them.

    Returns:
        `torch.Tensor` of shape `(M, width)`.
    """
    sample = min(_TITLES_PER_BATCH, len(known_texts))
    states = _read(backbone, _tokens(tokenizer, [*known_texts[:sample], *texts]))
    # In each dimension features lie on a line over states. A sample tells which one, without reading all texts again.
    known, features = states[:sample], known_features[:sample]
    centred = features - features.mean(dim=0)
    spread = centred.square().sum(dim=0)
    deviation = (centred * known).sum(dim=0) / spread.clamp_min(1e-6)
    mean = known.mean(dim=0) - deviation * features.mean(dim=0)
    # Where known texts do not differ, as a single one cannot, a model has only ever seen zeros.
    return torch.where(spread > 1e-6, (states[sample:] - mean) / deviation.clamp_min(1e-6), 0.0)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), truncation=True, max_length=MAX_TITLE_TOKENS)["input_ids"]


def _content_key(backbone: PreTrainedModel, tokens: list[list[int]]) -> str:
    config = backbone.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(hash_tensors(backbone.state_dict()).encode())
    digest.update(json.dumps([config, tokens], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read(backbone: PreTrainedModel, tokens: list[list[int]]) -> torch.Tensor:
    """The mean of the backbone's last states over each text's tokens, of shape `(N, width)`."""
    # Texts of like length share a batch, so that little is padding.
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    states = None
    with _as_reader(backbone):
        for start in tqdm(range(0, len(order), _TITLES_PER_BATCH), desc="Encoding item titles", leave=False):
            indices = order[start : start + _TITLES_PER_BATCH]
            means = _mean_states(backbone, [tokens[index] for index in indices])
            states = means.new_zeros(len(tokens), means.shape[1]) if states is None else states
            states[indices] = means
    return states


def _mean_states(backbone: PreTrainedModel, tokens: list[list[int]]) -> torch.Tensor:
    # A text without a token (an empty title and no special tokens) gets padding alone, and the zero vector.
    width = max(1, max(map(len, tokens)))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=backbone.device)
    lengths = torch.tensor([len(row) for row in tokens], device=backbone.device)
    mask = (torch.arange(width, device=backbone.device) < lengths[:, None]).long()
    attended = mask.clone()
    attended[:, 0] = 1
    states = backbone(input_ids=ids, attention_mask=attended).last_hidden_state.float()
    return (states * mask.unsqueeze(-1)).sum(dim=1) / lengths.clamp_min(1).unsqueeze(-1)


@contextmanager
def _as_reader(backbone: PreTrainedModel) -> Iterator[None]:
    """The backbone as it reads text best: an encoder that was made causal for the histories reads both ways."""
    with ExitStack() as stack:
        if getattr(backbone.config, "is_decoder", False):
            stack.enter_context(changed(backbone.config, is_decoder=False))
            for module in backbone.modules():
                if getattr(module, "is_causal", False):
                    stack.enter_context(changed(module, is_causal=False))
        stack.enter_context(evaluating(backbone))
        yield


@torch.no_grad()
def principal_item_vectors(features: torch.Tensor, width: int) -> torch.Tensor:
    """
    Item vectors in a CRM's width that hold what titles say, for a CRM to begin with.

    They are the principal components of the features ([`LowRankTeacher.item_vectors`]), of the size at which hidden
    states of unit components give scores that spread by two nats, about as a trained model's do.

    Args:
        features (`torch.Tensor` of shape `(N, d_text)`): one row per item, as [`encode_texts`] gives them.
        width (`int`): the CRM's number of dimensions; those beyond what the features have are zero.

    Returns:
        `torch.Tensor` of shape `(N + 1, width)`, float32; row 0, padding, is zero.
    """
    # As the best form of a teacher that has these for its item matrix and whose hidden states know no direction. On
    # the CPU, where double precision is to be had.
    item_matrix = torch.nn.functional.pad(features.cpu().float(), (0, 0, 1, 0))
    form = reduce_teacher(torch.eye(features.shape[1], dtype=torch.float64), item_matrix, max_rank=width)
    return form.item_vectors(width, _BEGINNING_SPREAD)


def average_of_alike(new: torch.Tensor, known: torch.Tensor, tables: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """
    For each new item the average of the known items' rows, weighted by how alike their titles are: a softmax over
    cosines, at so low a temperature that an equal title outweighs all others.

    Args:
        new (`torch.Tensor` of shape `(M, width)`): features of the new titles.
        known (`torch.Tensor` of shape `(N, width)`): features of the known titles.
        tables (`Sequence[torch.Tensor]`): what is averaged, each of shape `(N, ...)`.

    Returns:
        `list[torch.Tensor]`: one of shape `(M, ...)` per table.
    """
    known = torch.nn.functional.normalize(known.float(), dim=1)
    averages: list[list[torch.Tensor]] = [[] for _ in tables]
    for rows in torch.nn.functional.normalize(new.float(), dim=1).split(_COLD_ITEMS_PER_CHUNK):
        weights = (rows @ known.T / _LIKENESS_TEMPERATURE).softmax(dim=1)
        for average, table in zip(averages, tables, strict=True):
            average.append(weights.to(table.dtype) @ table)
    return [torch.cat(parts) for parts in averages]
