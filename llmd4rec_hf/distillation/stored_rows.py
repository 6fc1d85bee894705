# SPDX-License-Identifier: Apache-2.0
"""How a hidden state lies on disk: as it is if it is narrow, in 16 bits a number if it is wide."""

from __future__ import annotations

import numpy as np
import torch


# Up to this width a teacher costs a student's step little and a cache few bytes: it is kept exactly.
EXACT_WIDTH = 128
_LARGEST_CODE = 32767


def row_type(width: int) -> np.dtype:
    """What one position takes on disk."""
    if width <= EXACT_WIDTH:
        return np.dtype([("hidden", "<f4", (width,))])
    return np.dtype([("scale", "<f4"), ("codes", "<i2", (width,))])


def pack(hidden: torch.Tensor) -> np.ndarray:
    """
    Rows of [`row_type`] from hidden states of shape `(P, width)`.

    Wide ones become whole numbers times a scale of their own, the row's largest number by 32767. That is as small as
    float16 and, measured on trained and random teachers, up to nine times closer; it has no range to overflow either.
    """
    hidden = hidden.float()
    rows = np.empty(len(hidden), dtype=row_type(hidden.shape[1]))
    if "hidden" in rows.dtype.names:
        rows["hidden"] = hidden.cpu().numpy()
        return rows
    scale = (hidden.abs().amax(dim=1) / _LARGEST_CODE).clamp_min(torch.finfo(torch.float32).tiny)
    rows["scale"] = scale.cpu().numpy()
    rows["codes"] = (hidden / scale[:, None]).round().to(torch.int16).cpu().numpy()
    return rows


def unpack(rows: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Hidden states of shape `(P, width)`, float32, on `device`."""
    if "hidden" in rows.dtype.names:
        return torch.from_numpy(rows["hidden"]).to(device)
    # A copy, because a single row counts as contiguous with strides that torch does not take.
    scale = torch.from_numpy(rows["scale"].copy()).to(device)
    return torch.from_numpy(rows["codes"]).to(device).float().mul_(scale[:, None])
