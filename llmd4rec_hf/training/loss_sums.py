# SPDX-License-Identifier: Apache-2.0
"""The parts of the loss, added up from one log to the next."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from ..distillation import DistillationLoss


LOSS_SUMS_NAME = "loss_sums.json"
LOSS_PARTS = ("cross_entropy", "kl", "weight_mean", "agreement")


class LossSums:
    """
    What the next log will report of the parts of the loss: sums over the positions of this process, on its device, so
    that no step waits for them.

    Args:
        device (`torch.device`): of the loss.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, parts: DistillationLoss, positions: int, divisor: float | torch.Tensor, has_teacher: bool) -> None:
        """
        Add what a batch's loss was made of.

        Args:
            parts ([`DistillationLoss`]): the loss.
            positions (`int`): labelled positions of the batch.
            divisor (`float` or `torch.Tensor`): what the loss was divided by.
            has_teacher (`bool`): whether there is more to it than the cross-entropy.
        """
        for name in LOSS_PARTS if has_teacher else LOSS_PARTS[:1]:
            # The first two are sums over positions divided by `divisor`, the others means over positions.
            scale = divisor if name in LOSS_PARTS[:2] else positions
            self._sums[name] = self._sums.get(name, 0.0) + getattr(parts, name) * scale
        self._sums["positions"] = self._sums.get("positions", 0.0) + positions

    def over_processes(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums of all processes together, each of which has to call it; empty if nothing was added."""
        if not self._sums:
            return {}
        sums = torch.stack([torch.as_tensor(value).float().to(self.device) for value in self._sums.values()])
        return dict(zip(self._sums, accelerator.reduce(sums, "sum").tolist(), strict=True))

    def take_means(self, accelerator: Accelerator) -> dict[str, float]:
        """Means per position over all processes, after which it begins anew."""
        totals = self.over_processes(accelerator)
        self._sums = {}
        positions = totals.pop("positions", 0)
        return {name: total / max(positions, 1) for name, total in totals.items()}

    def resume(self, checkpoint: str | Path, is_main_process: bool) -> None:
        """Begin with those of a checkpoint, so that a stop in the middle leaves no gap in what is logged."""
        path = Path(checkpoint, LOSS_SUMS_NAME)
        sums = json.loads(path.read_text()) if path.is_file() else {}
        # They are of all processes together, and will be added up over them again.
        share = float(is_main_process)
        self._sums = {name: torch.tensor(value * share, device=self.device) for name, value in sums.items()}
