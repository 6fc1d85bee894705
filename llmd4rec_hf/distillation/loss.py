# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and weighted KL over the whole catalogue, without ever holding a positions x items matrix.

Every recommender here scores items as `hidden @ item_matrix.T`, so both losses and their gradients follow from two
(hidden, item matrix) pairs. [`distillation_loss`] walks over the positions in row chunks; per chunk it forms the
student's and the teacher's scores, both losses, the true item's rank in both, the sample weights, and the gradients
for the student's hidden states and item matrix. The backward pass only scales those gradients.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError
from .listed_scores import ListedScores
from .walk import LossSettings, Walk, autocast_dtype, default_chunk_size
from .weighting import WEIGHTINGS, WITHOUT_RANKS


logger = logging.getLogger(__name__)

IGNORE_INDEX = -100
# Items from which on numba's loops are taken, if it is installed: loading them takes a second, and compiling them,
# once per machine, a few more.
_MIN_COMPILED_ITEMS = 1024


@dataclass
class DistillationLoss:
    """
    What [`distillation_loss`] returns. Only `loss` carries a gradient.

    Attributes:
        loss (`torch.Tensor`, scalar): `cross_entropy + kl_weight * kl`.
        cross_entropy (`torch.Tensor`, scalar): next-item cross-entropy in nats, summed and divided by the number of
            positions (or by `num_items_in_batch`).
        kl (`torch.Tensor`, scalar): KL(teacher || student) in nats with sample weights and, if asked for, the squared
            temperature in it; divided like `cross_entropy`. Zero without a teacher.
        weight_mean (`torch.Tensor`, scalar): mean sample weight, in [0, 2] but for weightings of your own. Zero
            without a teacher.
        agreement (`torch.Tensor`, scalar): mean overlap of the two softened distributions, `sum_i min(p_i, q_i)`, in
            [0, 1]. Zero without a teacher.
        student_ranks (`torch.LongTensor` of shape `(P,)`, *optional*): 1-based rank of the true item under the
            student, ties counted against it; 0 at ignored positions.
        teacher_ranks (`torch.LongTensor` of shape `(P,)`, *optional*): likewise under the teacher.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor
    weight_mean: torch.Tensor
    agreement: torch.Tensor
    student_ranks: torch.Tensor | None
    teacher_ranks: torch.Tensor | None


def distillation_loss(
    hidden: torch.Tensor,
    item_matrix: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_item_matrix: torch.Tensor | None = None,
    *,
    teacher_lists: ListedScores | None = None,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    weighting: str = "rank",
    rank_base: int = 1,
    scale_by_temperature_squared: bool = True,
    chunk_size: int | None = None,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    count_ranks: bool = True,
) -> DistillationLoss:
    r"""
    Next-item cross-entropy plus sample-weighted KL against a frozen teacher, over all items.

    $$L = \frac{1}{n} \sum_i \mathrm{CE}_i + \lambda\, T^2\, w_i\, \mathrm{KL}\left(\mathrm{softmax}(t_i / T)\,\|\,
    \mathrm{softmax}(s_i / T)\right)$$

    The padding item (row 0 of both matrices) is outside both distributions. Softmaxes, losses, ranks and sums are in
    float32 whatever the inputs are; gradients come back in the inputs' dtypes. Matrix products are in float32 too,
    except under autocast (`--bf16`), where they are in its dtype and the gradients' relative error stays below 1e-2
    for scores up to about 20; the true item's own score is computed in float32 even then. Memory beyond inputs and
    gradients is one buffer of `chunk_size x N` scores per model, smaller ones for slices of it (on a GPU up to three
    of the same size), and a copy of both item matrices where their dtype is not the products'.

    Args:
        hidden (`torch.Tensor` of shape `(P, d)`):
            The student's hidden state at each supervised position.
        item_matrix (`torch.Tensor` of shape `(N + 1, d)`):
            The student's item matrix; row 0 is padding.
        labels (`torch.LongTensor` of shape `(P,)`):
            The true next item, in 1..N. Positions labelled -100 are ignored.
        teacher_hidden (`torch.Tensor` of shape `(P, d_t)`, *optional*):
            The teacher's hidden states at the same positions. Without a teacher the loss is plain cross-entropy.
        teacher_item_matrix (`torch.Tensor` of shape `(N + 1, d_t)`, *optional*):
            The teacher's item matrix over the same catalogue.
        teacher_lists ([`ListedScores`] of P lists, *optional*):
            In place of both, the best items of a teacher that has neither, with their log-probabilities in nats.
        temperature (`float`, *optional*, defaults to 1.0):
            Both distributions are softened by it in the KL term. Must be positive.
        kl_weight (`float`, *optional*, defaults to 1.0):
            Weight of the KL term against cross-entropy.
        weighting (`str`, *optional*, defaults to `"rank"`):
            `"rank"` for the paper's rank weights, `"confidence"` for their smooth counterpart, `"none"` for 1, or a
            name given to [`register_weighting`].
        rank_base (`int`, *optional*, defaults to 1):
            Rank of the best item inside the rank weights, 0 or 1. See [`rank_weights`].
        scale_by_temperature_squared (`bool`, *optional*, defaults to `True`):
            Multiply KL by `temperature**2`, so that its gradient keeps its size as the temperature changes (Hinton et
            al., 2015).
        chunk_size (`int`, *optional*):
            Rows processed at a time. Chosen from the catalogue size and the device by default.
        num_items_in_batch (`int`, `float` or `torch.Tensor`, *optional*):
            What the summed losses are divided by. The number of supervised positions by default.
        count_ranks (`bool`, *optional*, defaults to `True`):
            Whether to give back the true items' ranks. Where they are not wanted, and no weights are computed of them,
            the loss is spared a tenth of its work.

    Returns:
        [`DistillationLoss`]

    Raises:
        ConfigurationError: shapes that do not fit, labels outside 1..N, a teacher over another catalogue, a
            temperature that is not positive and finite, a chunk size below 1, an unknown weighting.

    Source: LLMD4Rec (arXiv 2505.18120), `L_down` and `L_up`. Computing the gradient in the forward pass, chunk by
    chunk, follows the idea of Liger-Kernel's fused linear losses.
    """
    check_options(temperature, weighting, rank_base, chunk_size)
    _check_shapes(hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix)
    check_lists(teacher_lists, len(labels), item_matrix.shape[0] - 1, teacher_hidden)
    teacher = teacher_hidden if teacher_lists is None else teacher_lists
    keep = labels != IGNORE_INDEX
    kept = labels[keep]
    check_labels(kept, item_matrix.shape[0] - 1, f" (or {IGNORE_INDEX} to ignore a position)")
    if kept.numel() < labels.numel():
        hidden = hidden[keep]
        teacher = None if teacher is None else teacher[keep]
    device, dtype = hidden.device, autocast_dtype(hidden.device.type)
    settings = LossSettings(
        temperature=1.0 if teacher is None else float(temperature),
        kl_weight=float(kl_weight),
        weighting=weighting,
        rank_base=rank_base,
        scale_by_temperature_squared=scale_by_temperature_squared,
        chunk_size=chunk_size or default_chunk_size(item_matrix.shape[0] - 1, device, dtype),
        matmul_dtype=dtype,
        count_ranks=count_ranks or (teacher is not None and weighting not in WITHOUT_RANKS),
    )
    divisor = max(kept.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    walk = functools.partial(
        _choose_walk(item_matrix, dtype, teacher),
        labels=kept,
        teacher=teacher,
        teacher_item_matrix=teacher_item_matrix,
        settings=settings,
    )
    result = loss_of_walk(walk, hidden, item_matrix, divisor, settings.kl_weight)
    counted = settings.count_ranks
    result.student_ranks = _spread(result.student_ranks, keep) if counted else None
    result.teacher_ranks = _spread(result.teacher_ranks, keep) if counted and teacher is not None else None
    return result


def _choose_walk(item_matrix: torch.Tensor, dtype: torch.dtype, teacher) -> type[Walk]:
    """What goes over the positions: loops compiled for this CPU where they can, and are worth their compilation."""
    suits = item_matrix.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)
    suits = suits and not isinstance(teacher, ListedScores) and not torch.compiler.is_compiling()
    compiled = _compiled_walk() if suits and len(item_matrix) > _MIN_COMPILED_ITEMS else None
    return compiled or Walk


@functools.cache
def _compiled_walk() -> type[Walk] | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from .compiled_walk import CompiledWalk
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        logger.warning("The loss does without numba: %s", error)
        return None
    return CompiledWalk


def loss_of_walk(walk, hidden, item_matrix, divisor, kl_weight: float) -> DistillationLoss:
    """
    The loss that a walk over the positions finds, with its gradients.

    Args:
        walk (`Callable`): makes an object with the attributes of [`Walk`], which its `run` fills, out of `hidden`,
            `item_matrix` and `need_gradients`.
        hidden, item_matrix (`torch.Tensor`): what the gradients are for.
        divisor (`int`, `float` or `torch.Tensor`): what the summed losses are divided by.
        kl_weight (`float`): weight of the KL term against cross-entropy.
    """
    if not torch.is_grad_enabled():
        # Inside an autograd function gradients are always off, so it can only see whether its inputs ask for them.
        hidden, item_matrix = hidden.detach(), item_matrix.detach()
    return DistillationLoss(*_ChunkedLoss.apply(hidden, item_matrix, walk, divisor, kl_weight))


class _ChunkedLoss(torch.autograd.Function):
    """Losses and gradients in one pass over row chunks; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, item_matrix, make_walk, divisor, kl_weight):
        need_gradients = hidden.requires_grad or item_matrix.requires_grad
        # What is in half precision below is so by choice.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            walk = make_walk(hidden, item_matrix, need_gradients)
            walk.run()
        count = max(hidden.shape[0], 1)
        cross_entropy, kl = walk.cross_entropy.sum() / divisor, walk.kl.sum() / divisor
        loss = cross_entropy + kl_weight * kl
        if need_gradients:
            ctx.save_for_backward(*walk.gradients)
            ctx.divisor, ctx.dtypes = divisor, (hidden.dtype, item_matrix.dtype)
        outputs = (cross_entropy, kl, walk.weights.sum() / count, walk.agreement.sum() / count, *walk.ranks)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return (loss, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 5
        grad_hidden, grad_items = ctx.saved_tensors
        hidden_dtype, items_dtype = ctx.dtypes
        factor = grad_loss / ctx.divisor
        return (
            (grad_hidden * factor).to(hidden_dtype) if ctx.needs_input_grad[0] else None,
            (grad_items * factor).to(items_dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 3,
        )


def _spread(ranks: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Ranks of the kept positions back at their places, 0 at ignored ones."""
    return ranks if ranks.numel() == keep.numel() else ranks.new_zeros(keep.shape).masked_scatter_(keep, ranks)


def check_options(temperature: float, weighting: str, rank_base: int, chunk_size: int | None) -> None:
    """Raise for settings that no loss can be computed with."""
    if not 0 < temperature < math.inf:
        raise ConfigurationError(f"temperature must be positive and finite, got {temperature!r}.")
    if chunk_size is not None and chunk_size < 1:
        raise ConfigurationError(f"chunk_size must be at least 1, or left out, got {chunk_size!r}.")
    if weighting not in WEIGHTINGS:
        raise ConfigurationError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    if rank_base not in (0, 1):
        raise ConfigurationError(f"rank_base must be 0 or 1, got {rank_base!r}.")


def check_labels(labels: torch.Tensor, num_items: int, or_else: str = "") -> None:
    """Raise for labels outside of 1..N; `or_else` names what else is allowed."""
    if not labels.numel():
        return
    lowest, highest = torch.stack(labels.aminmax()).tolist()  # one read, for which a GPU is waited for
    if not 1 <= lowest <= highest <= num_items:
        raise ConfigurationError(f"labels must be in 1..{num_items}{or_else}, got {lowest}..{highest}.")


def check_lists(lists: ListedScores | None, positions: int, num_items: int, teacher_hidden) -> None:
    """Raise for a teacher's lists that are of other positions or items, or one teacher too many."""
    if lists is None:
        return
    if teacher_hidden is not None:
        raise ConfigurationError("teacher_lists take the place of a teacher's hidden states and items: leave those.")
    if len(lists) != positions:
        raise ConfigurationError(f"teacher_lists must be {positions}, one per position, got {len(lists)}.")
    if lists.ids.numel() and not (0 <= int(lists.ids.min()) and int(lists.ids.max()) <= num_items):
        raise ConfigurationError(
            f"The teacher lists items {int(lists.ids.min())}..{int(lists.ids.max())} and the student scores 1.."
            f"{num_items}: both must be built over the same item vocabulary."
        )


def _check_shapes(hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix):
    if hidden.dim() != 2 or item_matrix.dim() != 2 or hidden.shape[1] != item_matrix.shape[1]:
        raise ConfigurationError(
            f"hidden must be (P, d) and item_matrix (N + 1, d), got {tuple(hidden.shape)} and "
            f"{tuple(item_matrix.shape)}."
        )
    if item_matrix.shape[0] < 2:
        raise ConfigurationError("item_matrix holds no item: row 0 is padding.")
    if labels.shape != hidden.shape[:1]:
        raise ConfigurationError(f"labels must be of shape {tuple(hidden.shape[:1])}, got {tuple(labels.shape)}.")
    if (teacher_hidden is None) != (teacher_item_matrix is None):
        raise ConfigurationError("teacher_hidden and teacher_item_matrix go together: give both or neither.")
    if teacher_hidden is None:
        return
    if teacher_item_matrix.shape[0] != item_matrix.shape[0]:
        raise ConfigurationError(
            f"The teacher scores {teacher_item_matrix.shape[0] - 1} items and the student {item_matrix.shape[0] - 1}: "
            "both must be built over the same item vocabulary."
        )
    if teacher_hidden.shape != (hidden.shape[0], teacher_item_matrix.shape[1]):
        raise ConfigurationError(
            f"teacher_hidden must be of shape {(hidden.shape[0], teacher_item_matrix.shape[1])}, got "
            f"{tuple(teacher_hidden.shape)}."
        )
