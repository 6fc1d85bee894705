# SPDX-License-Identifier: Apache-2.0
"""A model's mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode from before, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
