# SPDX-License-Identifier: Apache-2.0
"""A trained CRM as a file that runs without this package: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import copy
import logging
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram

from .errors import ConfigurationError, first_line
from .files import storage_errors_named, write_json
from .models import LLMRecommender, RecommenderModel


FORMAT_VERSION = 2
FILES = {"onnx": "recommender.onnx", "torch": "recommender.pt2"}
FACTS_NAME = "export.json"
ITEM_MATRIX_NAME = "item_matrix.npy"
# A protobuf, and hence an ONNX file with its weights in it, ends at 2 GiB.
_LARGEST_ONNX_BYTES = 3 << 29


def export_model(
    model: RecommenderModel, output_dir: str | os.PathLike, format: str = "onnx", *, k: int | None = 100
) -> Path:
    """
    Write a CRM as one graph from histories to recommendations, with its vocabulary beside it.

    The graph takes any number of histories of any length up to the model's `max_length`. Its inputs and outputs, all
    on internal ids (`vocabulary.json` lists the external ones, the first has internal id 1):

    - `item_ids (B, T)`, int64: the newest items of each history, oldest first, padded with 0 on the right.
    - `seen (B, S)`, int64: items to leave out, padded with 0; a column of zeros filters nothing.
    - `recommended (B, k)`, int64: the best items, best first; 0 where fewer than `k` are left.
    - `scores (B, k)`, float32: their logits; -inf where fewer than `k` are left.

    With `k=None` the graph ends before the catalogue: it takes `item_ids` and gives `hidden (B, d)`, float32, to be
    looked up in an index of approximate neighbours over `item_matrix.npy (N + 1, d)`, which is written beside it.

    Args:
        model ([`RecommenderModel`]): the CRM; it is left as it is. Where its `encode` cannot be traced for histories
            of any length, the graph pads them to `max_length` itself.
        output_dir (`str`): gets `recommender.onnx` (and `recommender.onnx.data` for catalogues beyond 1.5 GiB) or
            `recommender.pt2`, `vocabulary.json`, and `export.json` with `format`, `k`, `max_length`, `num_items` and
            `vocabulary`, the vocabulary's content hash.
        format (`str`, *optional*, defaults to `"onnx"`): `"onnx"`, which needs the extra `export`, or `"torch"`.
        k (`int`, *optional*, defaults to 100): length of each list, the most a request can ask for; never more than
            there are items.

    Returns:
        `Path`: the graph's file.

    Raises:
        ConfigurationError: an LLM, a model without vocabulary, a `k` below 1, an unknown format or one whose packages
            are missing, a torch that would pickle parts of a program, or a model that cannot be traced.
        StorageError: `output_dir` is a file, or cannot be written to.

    Example:

    ```python
    >>> export_model(SASRecModel.from_pretrained("runs/mine/crm"), "deploy")
    PosixPath('deploy/recommender.onnx')
    ```
    """
    _check(model, format, k)
    # On the CPU, in full precision and without dropout, whatever the caller's model is in the middle of.
    model = copy.deepcopy(model).cpu().float().eval()
    k = None if k is None else min(k, model.config.num_items)
    path = Path(output_dir, FILES[format])
    with (
        _quiet_exporter(),
        storage_errors_named(path.parent, "Give a folder with room that can be written to."),
    ):
        program, shapes = _trace(model, k)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Removed first and written last: while it is there, all files are of one model.
        path.with_name(FACTS_NAME).unlink(missing_ok=True)
        if format == "onnx":
            _save_onnx(program, path, shapes)
        else:
            _save_torch(program, path)
        if k is None:
            np.save(path.with_name(ITEM_MATRIX_NAME), model.item_matrix().detach().numpy(), allow_pickle=False)
        model.vocabulary.save_pretrained(path.parent)
        facts = {"format_version": FORMAT_VERSION, "format": format, "k": k, "max_length": model.config.max_length}
        facts |= {"num_items": model.config.num_items, "vocabulary": model.vocabulary.content_hash}
        write_json(path.with_name(FACTS_NAME), facts)
    return path


def _check(model: RecommenderModel, format: str, k: int | None) -> None:
    if any(isinstance(part, LLMRecommender) for part in model.modules()):
        raise ConfigurationError(
            "An LLM recommender is not exported: deploy the CRM that has learned from it, or call its `recommend`."
        )
    if model.vocabulary is None:
        raise ConfigurationError("The model has no item vocabulary to go with the graph: set `model.vocabulary`.")
    model.check_vocabulary()
    if k is not None and k < 1:
        raise ConfigurationError(f"k must be at least 1, or None for the hidden states alone, got {k}.")
    if format not in FILES:
        raise ConfigurationError(f"format must be one of {', '.join(FILES)}, got {format!r}.")


class Encoder(nn.Module):
    """The graph without the catalogue: `item_ids (B, T)` to `hidden (B, d)`."""

    def __init__(self, model: RecommenderModel, padded: bool):
        super().__init__()
        self.model, self.padded = model, padded

    def forward(self, item_ids: torch.Tensor) -> torch.Tensor:
        if self.padded:
            item_ids = F.pad(item_ids, (0, self.model.config.max_length - item_ids.shape[1]))
        return self.model.encode_last(item_ids)


class Ranker(Encoder):
    """The whole graph: `item_ids (B, T)` and `seen (B, S)` to `recommended (B, k)` and `scores (B, k)`."""

    def __init__(self, model: RecommenderModel, padded: bool, k: int):
        super().__init__(model, padded)
        self.k = k

    def forward(self, item_ids: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = super().forward(item_ids) @ self.model.item_matrix().T
        # The zero in front leaves out the padding item of rows that have nothing else to leave out.
        scores = scores.scatter(1, F.pad(seen, (1, 0)), -torch.inf)
        values, indices = scores.topk(self.k, dim=1)
        return torch.where(values.isfinite(), indices, 0), values


def _trace(model: RecommenderModel, k: int | None) -> tuple[ExportedProgram, dict]:
    """The graph as a program, and the names of its dynamic dimensions."""
    batch = Dim("batch")
    inputs = {"item_ids": torch.tensor([[1, 1, 1], [1, 0, 0]])[:, : model.config.max_length]}
    shapes = {"item_ids": {0: batch, 1: Dim("length", max=model.config.max_length)}}
    if model.config.max_length == 1:
        del shapes["item_ids"][1]
    if k is not None:
        inputs["seen"] = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0]])
        shapes["seen"] = {0: batch, 1: Dim("seen")}
    errors = []
    for padded in (False, True):
        graph = Encoder(model, padded) if k is None else Ranker(model, padded, k)
        try:
            with torch.no_grad():
                program = torch.export.export(graph.eval(), (), inputs, dynamic_shapes=shapes, strict=False)
            return program, shapes
        except Exception as error:  # a model of the user's own may fail in any way
            errors.append(error)
    reason = first_line(errors[-1])
    raise ConfigurationError(f"{type(model).__name__} cannot be traced by torch.export: {reason}") from errors[0]


def _save_torch(program: ExportedProgram, path: Path) -> None:
    # The inputs that it was traced with would be stored as a pickle; nothing needs them.
    program._example_inputs = None  # the setter of older releases takes no `None`
    torch.export.save(program, path)
    if pickled := pickles_in(path):
        path.unlink()
        raise ConfigurationError(
            f"torch {torch.__version__} puts pickles into a program ({pickled[0]}), which this package never writes: "
            "take a newer torch, or format='onnx'."
        )


def pickles_in(path: Path) -> list[str]:
    """Names of the pickles in an archive: bare ones, and archives of their own, as `torch.save` writes them."""
    with zipfile.ZipFile(path) as archive:
        heads = {name: archive.open(name).read(2) for name in archive.namelist()}
    return [name for name, head in heads.items() if head == b"PK" or head[:1] == b"\x80"]


def _save_onnx(program: ExportedProgram, path: Path, shapes: dict) -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"{error.name} is missing: pip install 'llmd4rec-hf[export]'.") from error
    outputs = ["recommended", "scores"] if "seen" in shapes else ["hidden"]
    graph = torch.onnx.export(
        program, dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=list(shapes), output_names=outputs
    )
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    graph.save(path, external_data=size > _LARGEST_ONNX_BYTES)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without warnings about operators of packages that are not installed, and about torch's own insides."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
