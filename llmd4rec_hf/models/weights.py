# SPDX-License-Identifier: Apache-2.0
"""Weights of a model: how they begin, where they are stored, and what tells them from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ..errors import ConfigurationError, first_line


@contextmanager
def loading(source: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Names the recommender that cannot be loaded, where libraries say what they miss of it."""
    try:
        yield
    except ConfigurationError:  # says all itself, and is a ValueError too
        raise
    except (OSError, SafetensorError, ValueError) as error:
        reason = f"{first_line(error)} {remedy if isinstance(error, ValueError) else ''}".strip()
        raise ConfigurationError(f"Cannot load a recommender from {str(source)!r}: {reason}") from error


def hub_arguments(kwargs: dict) -> dict:
    """Those of `from_pretrained`'s arguments that say where files come from."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def find_file(source: str | os.PathLike, name: str, **hub_kwargs) -> str | None:
    """The path of a file that a folder or a Hub repository may hold; `None` if it does not."""
    with loading(source):  # a repository that is not there, or not for this token
        return cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)


def stored_weights(source: str | os.PathLike, **hub_kwargs) -> dict[str, torch.Tensor]:
    """All tensors that `save_pretrained` wrote, to a folder or the Hub, in one file or in shards."""
    # The one file first, as transformers does: pushes leave an earlier model's shards where they are.
    whole = find_file(source, SAFE_WEIGHTS_NAME, **hub_kwargs)
    index = None if whole else find_file(source, SAFE_WEIGHTS_INDEX_NAME, **hub_kwargs)
    if index is None:
        return load_file(whole or cached_file(source, SAFE_WEIGHTS_NAME, **hub_kwargs))
    paths, _ = get_checkpoint_shard_files(source, index, **hub_kwargs)
    return {name: value for path in paths for name, value in load_file(path).items()}


def load_stored_weights(model: PreTrainedModel, source: str | os.PathLike, may_lack: str | tuple = (), **hub_kwargs):
    """
    Bring all that `save_pretrained` wrote into a model, in place. Nothing may be missing whose name does not begin
    with `may_lack`, nor be left over.

    Raises:
        ConfigurationError: torn weights, or those of another model.
    """
    try:
        weights = stored_weights(source, **hub_kwargs)
        # Of tied ones only one is stored. A model that never calls `post_init` has not looked for them.
        for tied, other in getattr(model, "all_tied_weights_keys", {}).items():
            if tied not in weights and other in weights:
                weights[tied] = weights[other]
        outcome = model.load_state_dict(weights, strict=False)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(f"The weights in {source} do not fit this model: {error}") from error
    missing = [name for name in outcome.missing_keys if not name.startswith(may_lack)]
    if missing or outcome.unexpected_keys:
        raise ConfigurationError(
            f"The weights in {source} do not fit this model: missing {missing[:3]}, unexpected "
            f"{outcome.unexpected_keys[:3]}."
        )


def remove_weights(folder: str | os.PathLike) -> None:
    """Delete what would be taken for the weights of a model that is saved next, in one file where these are shards."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        Path(folder, name).unlink(missing_ok=True)


def split_state(
    state: dict[str, torch.Tensor], prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a model without those of a part of it, and those, by the part's own names."""
    rest = {name: value for name, value in state.items() if not name.startswith(prefix)}
    return rest, {name.removeprefix(prefix): value for name, value in state.items() if name not in rest}


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def init_recommender_weights(module: nn.Module, draw: Callable | None = None) -> None:
    """Initialise embeddings and linear maps, by Xavier's rule unless `draw` is given; padding and biases are zero."""
    if isinstance(module, (nn.Embedding, nn.Linear)):
        # Looked up at each call: while transformers loads a model, it has functions of its own in this place.
        (draw or nn.init.xavier_normal_)(module.weight)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
