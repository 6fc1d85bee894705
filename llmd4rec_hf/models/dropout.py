# SPDX-License-Identifier: Apache-2.0
"""Dropout whose masks cost little on a CPU."""

from __future__ import annotations

import torch
from torch import nn


# A rate is rounded to as many parts: sixteen bits are drawn for each number.
_PARTS = 2**16


class Dropout(nn.Dropout):
    """
    [`torch.nn.Dropout`], whose masks are drawn by other means on a CPU: of sixteen random bits for each number. Those
    that torch draws take more than five times as long, which in a SASRec was more than half of the time before the
    loss, and in an encoder with LoRA a seventh of a step.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # A compiler makes its own masks, at the place where they are read.
        as_torch = input.device.type != "cpu" or torch.compiler.is_compiling()
        if not self.training or not 0 < self.p < 1 or as_torch:
            return super().forward(input)
        dropped = min(round(self.p * _PARTS), _PARTS - 1)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64)
        bits = words.random_(torch.iinfo(torch.int64).min, None).view(torch.int16)[: input.numel()].view(input.shape)
        kept = torch.ge(bits, dropped - _PARTS // 2, out=torch.empty(input.shape, dtype=torch.float32))
        return input * kept.mul_(_PARTS / (_PARTS - dropped)).to(input.dtype)


def use_cheap_masks(model: nn.Module) -> None:
    """Let dropouts of a model that is not ours, or of its adapter, draw their masks as [`Dropout`] does."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout:
            model.set_submodule(name, Dropout(module.p).train(module.training))
