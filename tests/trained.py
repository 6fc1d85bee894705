# SPDX-License-Identifier: Apache-2.0
"""What tests ask of a training that has ended."""

from __future__ import annotations

import torch


def losses(trainer) -> list[float]:
    """The training loss of each log."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> torch.Tensor:
    """All parameters of a model in one row."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
