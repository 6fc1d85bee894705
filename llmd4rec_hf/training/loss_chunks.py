# SPDX-License-Identifier: Apache-2.0
"""Out of memory in the loss: smaller chunks, not the end of a run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers.utils import logging


logger = logging.get_logger(__name__)

T = TypeVar("T")


class LossChunks:
    """
    Runs a loss over row chunks, and halves them where memory does not suffice. The loss stays the same.

    Args:
        size (`int`, *optional*): positions per chunk; the loss chooses until memory has run out once.
    """

    def __init__(self, size: int | None = None):
        self.size = size

    def run(self, loss: Callable[[int | None], T], choose: Callable[[], int], positions: int) -> T:
        """
        Call `loss(chunk_size)`, with smaller chunks until it goes through.

        Args:
            loss (`Callable`): takes the positions per chunk, or `None` to choose them.
            choose (`Callable`): says how many it then chooses.
            positions (`int`): most that a chunk can have.

        Raises:
            RuntimeError: memory does not suffice for chunks of a single position.
        """
        while True:
            try:
                return loss(self.size)
            except RuntimeError as error:
                size = min(self.size or choose(), positions)
                if size <= 1 or not should_reduce_batch_size(error):
                    raise
            # Not inside the handler: the error holds on to every tensor of the failed attempt.
            self.size = (size + 1) // 2
            logger.warning(f"Out of memory in the loss: from now on it takes {self.size} positions at a time.")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
