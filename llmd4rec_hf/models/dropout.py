# SPDX-License-Identifier: Apache-2.0
"""Dropout whose masks cost little on a CPU."""

from __future__ import annotations

import torch
from torch import nn


class Dropout(nn.Dropout):
    """
    [`torch.nn.Dropout`], whose masks are drawn by other means on a CPU: there a uniform number takes a quarter of the
    time of a Bernoulli one, which in a SASRec is more than half of the time before the loss.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or not 0 < self.p < 1 or input.device.type != "cpu":
            return super().forward(input)
        # Drawn in float32: in half precision few numbers are below a small rate.
        factors = torch.rand_like(input, dtype=torch.float32).ge_(self.p).mul_(1 / (1 - self.p))
        return input * factors.to(input.dtype)
