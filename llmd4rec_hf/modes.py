# SPDX-License-Identifier: Apache-2.0
"""What is otherwise for the length of a `with` block: a model's mode, attributes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part is in the mode from before, whatever happened."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training


@contextmanager
def changed(owner: Any, **values) -> Iterator[None]:
    """Attributes that have other values inside; afterwards those from before, whatever happened."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
