# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and weighted KL over the whole catalogue, without ever holding a positions x items matrix.

Every recommender here scores items as `hidden @ item_matrix.T`, so both losses and their gradients follow from two
(hidden, item matrix) pairs. [`distillation_loss`] walks over the positions in row chunks; per chunk it forms the
student's and the teacher's scores, both losses, the true item's rank in both, the sample weights, and the gradients
for the student's hidden states and item matrix. The backward pass only scales those gradients.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError
from .weighting import WEIGHTINGS, TargetOutcome, rank_weights


IGNORE_INDEX = -100

# Bytes of one chunk x items buffer (a step holds four of them at most). On a CPU it should stay near the caches, but
# the gradient of the item matrix is read and written once per chunk, which asks for tall chunks; on a GPU launch
# overhead asks for more.
_CHUNK_BYTES = {"cpu": 6 << 20, "cuda": 256 << 20}
_MIN_CHUNK_ROWS = 32


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
        weight_mean (`torch.Tensor`, scalar): mean sample weight, in [0, 2]. Zero without a teacher.
        agreement (`torch.Tensor`, scalar): mean overlap of the two softened distributions, `sum_i min(p_i, q_i)`, in
            [0, 1]. Zero without a teacher.
        student_ranks (`torch.LongTensor` of shape `(P,)`): 1-based rank of the true item under the student, ties
            counted against it; 0 at ignored positions.
        teacher_ranks (`torch.LongTensor` of shape `(P,)`, *optional*): likewise under the teacher.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    kl: torch.Tensor
    weight_mean: torch.Tensor
    agreement: torch.Tensor
    student_ranks: torch.Tensor
    teacher_ranks: torch.Tensor | None


@dataclass(frozen=True)
class _Settings:
    temperature: float
    kl_weight: float
    weighting: str
    rank_base: int
    scale_by_temperature_squared: bool
    chunk_size: int
    matmul_dtype: torch.dtype

    @property
    def kl_scale(self) -> float:
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0


def distillation_loss(
    hidden: torch.Tensor,
    item_matrix: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_item_matrix: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    weighting: str = "rank",
    rank_base: int = 1,
    scale_by_temperature_squared: bool = True,
    chunk_size: int | None = None,
    num_items_in_batch: int | float | torch.Tensor | None = None,
) -> DistillationLoss:
    r"""
    Next-item cross-entropy plus sample-weighted KL against a frozen teacher, over all items.

    $$L = \frac{1}{n} \sum_i \mathrm{CE}_i + \lambda\, T^2\, w_i\, \mathrm{KL}\left(\mathrm{softmax}(t_i / T)\,\|\,
    \mathrm{softmax}(s_i / T)\right)$$

    The padding item (row 0 of both matrices) is outside both distributions. Softmaxes, losses, ranks and sums are in
    float32 whatever the inputs are; gradients come back in the inputs' dtypes. Matrix products are in float32 too,
    except under autocast (`--bf16`), where they are in its dtype and the gradients' relative error stays below 1e-2;
    the true item's own score is computed in float32 even then. Memory beyond inputs and gradients is a few buffers of
    `chunk_size x N` floats.

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

    Returns:
        [`DistillationLoss`]

    Raises:
        ConfigurationError: shapes that do not fit, labels outside 1..N, a teacher over another catalogue, a
            temperature that is not positive, an unknown weighting.

    Source: LLMD4Rec (arXiv 2505.18120), `L_down` and `L_up`. Computing the gradient in the forward pass, chunk by
    chunk, follows the idea of Liger-Kernel's fused linear losses.
    """
    _check_arguments(hidden, item_matrix, teacher_hidden, teacher_item_matrix, temperature, weighting, rank_base)
    keep = labels != IGNORE_INDEX
    kept = labels[keep]
    _check_labels(labels, kept, hidden, item_matrix)
    if kept.numel() < labels.numel():
        hidden = hidden[keep]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[keep]
    settings = _Settings(
        temperature=float(temperature),
        kl_weight=float(kl_weight),
        weighting=weighting,
        rank_base=rank_base,
        scale_by_temperature_squared=scale_by_temperature_squared,
        chunk_size=chunk_size or default_chunk_size(item_matrix.shape[0] - 1, hidden.device),
        matmul_dtype=_autocast_dtype(hidden.device.type),
    )
    if not torch.is_grad_enabled():
        # Inside an autograd function gradients are always off, so it can only see whether its inputs ask for them.
        hidden, item_matrix = hidden.detach(), item_matrix.detach()
    divisor = max(kept.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    loss, cross_entropy, kl, weight_mean, agreement, student_ranks, teacher_ranks = _ChunkedLoss.apply(
        hidden, item_matrix, kept, teacher_hidden, teacher_item_matrix, divisor, settings
    )
    return DistillationLoss(
        loss=loss,
        cross_entropy=cross_entropy,
        kl=kl,
        weight_mean=weight_mean,
        agreement=agreement,
        student_ranks=_spread(student_ranks, keep),
        teacher_ranks=None if teacher_hidden is None else _spread(teacher_ranks, keep),
    )


def default_chunk_size(num_items: int, device: torch.device | str) -> int:
    """Rows per chunk so that one chunk x items buffer of float32 stays within the device's budget."""
    budget = _CHUNK_BYTES.get(torch.device(device).type, _CHUNK_BYTES["cuda"])
    return max(_MIN_CHUNK_ROWS, budget // (4 * num_items))


class _ChunkedLoss(torch.autograd.Function):
    """Losses and gradients in one pass over row chunks; the backward pass only scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix, divisor, settings):
        need_gradients = hidden.requires_grad or item_matrix.requires_grad
        # What is in half precision below is so by choice.
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            sums, ranks, gradients = _run_chunks(
                hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix, settings, need_gradients
            )
        count = max(labels.numel(), 1)
        cross_entropy, kl = sums["cross_entropy"] / divisor, sums["kl"] / divisor
        loss = cross_entropy + settings.kl_weight * kl
        if need_gradients:
            ctx.save_for_backward(*(gradient.div_(divisor) for gradient in gradients))
            ctx.dtypes = hidden.dtype, item_matrix.dtype
        outputs = (cross_entropy, kl, sums["weight"] / count, sums["agreement"] / count, *ranks)
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        return (loss, *outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * 7
        grad_hidden, grad_items = ctx.saved_tensors
        hidden_dtype, items_dtype = ctx.dtypes
        return (
            (grad_hidden * grad_loss).to(hidden_dtype) if ctx.needs_input_grad[0] else None,
            (grad_items * grad_loss).to(items_dtype) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )


def _run_chunks(hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix, settings, need_gradients):
    """Sums of the losses over all positions, both ranks per position, and the gradients of the summed loss."""
    side = _Side(hidden, item_matrix, settings.matmul_dtype)
    teacher_side = (
        None if teacher_hidden is None else _Side(teacher_hidden, teacher_item_matrix, settings.matmul_dtype)
    )
    positions, num_items = hidden.shape[0], item_matrix.shape[0] - 1
    rows = max(1, min(settings.chunk_size, positions))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    buffers = [empty(rows, num_items) for _ in range(2 if teacher_side is None else 4)]
    sums = {name: empty(()).zero_() for name in ("cross_entropy", "kl", "weight", "agreement")}
    ranks = [labels.new_zeros(positions) for _ in range(2)]
    gradients = (empty(hidden.shape), empty(item_matrix.shape).zero_()) if need_gradients else None
    for start in range(0, positions, rows):
        part = slice(start, min(start + rows, positions))
        size = part.stop - start
        targets = (labels[part] - 1).unsqueeze(1)
        scores, work, *teacher_buffers = (buffer[:size] for buffer in buffers)
        side.score(part, targets, out=scores)
        student = _TargetStatistics.of(scores, targets, work)
        ranks[0][part] = student.ranks
        gradient = None
        if teacher_side is not None:
            teacher_scores, teacher_work = teacher_buffers
            teacher_side.score(part, targets, out=teacher_scores)
            teacher = _TargetStatistics.of(teacher_scores, targets, teacher_work)
            ranks[1][part] = teacher.ranks
            gradient = _add_kl(scores, student, teacher_scores, teacher, work, teacher_work, sums, settings)
        # The plain softmax comes last: with a teacher its buffer still holds the softened one until here.
        probabilities = torch.softmax(scores, dim=1, out=work)
        sums["cross_entropy"] += (student.log_sum_exp(probabilities) - student.target_scores).sum()
        if need_gradients:
            gradient = probabilities if gradient is None else gradient.add_(probabilities)
            gradient.scatter_add_(1, targets, gradient.new_full((size, 1), -1.0))
            side.add_gradients(part, gradient, gradients)
    return sums, ranks, gradients


class _Side:
    """One model's hidden states and items (without padding), in the dtype of the matrix products."""

    def __init__(self, hidden: torch.Tensor, item_matrix: torch.Tensor, dtype: torch.dtype):
        self.exact_hidden, self.exact_items = hidden.detach(), item_matrix[1:].detach()
        self.hidden, self.items = self.exact_hidden.to(dtype), self.exact_items.to(dtype)

    def score(self, part: slice, targets: torch.Tensor, out: torch.Tensor) -> None:
        """Scores of a chunk in float32."""
        if self.hidden.dtype == torch.float32:
            torch.mm(self.hidden[part], self.items.T, out=out)
            return
        out.copy_(torch.mm(self.hidden[part], self.items.T))
        # Rounded, the true item would tie with many others: both its loss and its rank want its score exact.
        own = self.exact_items[targets.squeeze(1)].float()
        out.scatter_(1, targets, torch.linalg.vecdot(self.exact_hidden[part].float(), own).unsqueeze(1))

    def add_gradients(self, part: slice, gradient: torch.Tensor, gradients: tuple[torch.Tensor, torch.Tensor]) -> None:
        """From the gradient of a chunk's scores to those of hidden states and item matrix, in float32."""
        grad_hidden, grad_items = gradients
        if self.hidden.dtype == torch.float32:
            torch.mm(gradient, self.items, out=grad_hidden[part])
            grad_items[1:].addmm_(gradient.T, self.hidden[part])
        else:
            gradient = gradient.to(self.hidden.dtype)
            grad_hidden[part] = torch.mm(gradient, self.items)
            grad_items[1:] += torch.mm(gradient.T, self.hidden[part])


def _add_kl(scores, student, teacher_scores, teacher, work, teacher_work, sums, settings):
    """Add a chunk's weighted KL to `sums`; returns its gradient for the student's scores, in `teacher_work`."""
    temperature = settings.temperature
    if temperature == 1.0:
        student_probabilities = torch.softmax(scores, dim=1, out=work)
        teacher_probabilities = torch.softmax(teacher_scores, dim=1, out=teacher_work)
        difference = teacher_scores.sub_(scores)
    else:
        torch.softmax(torch.mul(scores, 1 / temperature, out=work), dim=1, out=work)
        torch.softmax(torch.mul(teacher_scores, 1 / temperature, out=teacher_work), dim=1, out=teacher_work)
        student_probabilities, teacher_probabilities = work, teacher_work
        difference = teacher_scores.sub_(scores).mul_(1 / temperature)
    student_lse = student.log_sum_exp(student_probabilities, temperature)
    teacher_lse = teacher.log_sum_exp(teacher_probabilities, temperature)
    # KL(p || q) = sum_i p_i (t_i - s_i) / T - lse(t / T) + lse(s / T)
    kl = torch.linalg.vecdot(teacher_probabilities, difference) - teacher_lse + student_lse
    weights = _sample_weights(student, student_lse, teacher, teacher_lse, settings)
    sums["kl"] += settings.kl_scale * (weights * kl).sum()
    sums["weight"] += weights.sum()
    sums["agreement"] += torch.minimum(student_probabilities, teacher_probabilities, out=teacher_scores).sum()
    gradient = torch.sub(student_probabilities, teacher_probabilities, out=teacher_work)
    return gradient.mul_((settings.kl_weight * settings.kl_scale / temperature * weights).unsqueeze(1))


@dataclass
class _TargetStatistics:
    """What is needed of a chunk of scores beyond their softmax. All of shape `(rows,)`."""

    target_scores: torch.Tensor
    maxima: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor) -> _TargetStatistics:
        target_scores = scores.gather(1, targets)
        # Counting "at least as good" counts the target itself once and every tie against it. Floats are compared and
        # added up six times faster than booleans, and whole numbers exactly up to 2**24.
        exact = torch.float32 if scores.shape[1] < 2**24 else torch.float64
        ranks = torch.ge(scores, target_scores, out=buffer).sum(dim=1, dtype=exact).long()
        return cls(target_scores.squeeze(1), scores.amax(dim=1), ranks)

    def log_sum_exp(self, probabilities: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """The softmax's normaliser, read off the largest probability, which is `exp(max - lse)` and cannot vanish."""
        return self.maxima / temperature - probabilities.amax(dim=1).log()


def _autocast_dtype(device_type: str) -> torch.dtype:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32


def _sample_weights(student, student_lse, teacher, teacher_lse, settings):
    if settings.weighting == "rank":
        return rank_weights(student.ranks, teacher.ranks, settings.rank_base)
    return WEIGHTINGS[settings.weighting](
        TargetOutcome(student.ranks, student.target_scores / settings.temperature - student_lse),
        TargetOutcome(teacher.ranks, teacher.target_scores / settings.temperature - teacher_lse),
    )


def _spread(ranks: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Ranks of the kept positions back at their places, 0 at ignored ones."""
    return ranks if ranks.numel() == keep.numel() else ranks.new_zeros(keep.shape).masked_scatter_(keep, ranks)


def _check_arguments(hidden, item_matrix, teacher_hidden, teacher_item_matrix, temperature, weighting, rank_base):
    if hidden.dim() != 2 or item_matrix.dim() != 2 or hidden.shape[1] != item_matrix.shape[1]:
        raise ConfigurationError(
            f"hidden must be (P, d) and item_matrix (N + 1, d), got {tuple(hidden.shape)} and "
            f"{tuple(item_matrix.shape)}."
        )
    if not temperature > 0:
        raise ConfigurationError(f"temperature must be positive, got {temperature!r}.")
    if weighting not in WEIGHTINGS:
        raise ConfigurationError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    if rank_base not in (0, 1):
        raise ConfigurationError(f"rank_base must be 0 or 1, got {rank_base!r}.")
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


def _check_labels(labels, kept, hidden, item_matrix):
    if labels.shape != hidden.shape[:1]:
        raise ConfigurationError(f"labels must be of shape {tuple(hidden.shape[:1])}, got {tuple(labels.shape)}.")
    if kept.numel() and not (1 <= int(kept.min()) and int(kept.max()) < item_matrix.shape[0]):
        raise ConfigurationError(
            f"labels must be in 1..{item_matrix.shape[0] - 1} (or {IGNORE_INDEX} to ignore a position), got "
            f"{int(kept.min())}..{int(kept.max())}."
        )
