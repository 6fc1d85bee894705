# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and weighted KL over the whole catalogue, without ever holding a positions x items matrix.

Every recommender here scores items as `hidden @ item_matrix.T`, so both losses and their gradients follow from two
(hidden, item matrix) pairs. [`distillation_loss`] walks over the positions in row chunks; per chunk it forms the
student's and the teacher's scores, both losses, the true item's rank in both, the sample weights, and the gradients
for the student's hidden states and item matrix. The backward pass only scales those gradients.

On a CPU half of the time goes into matrix products, and most of the rest into reading and writing scores: hence the
sizes below, the powers of two, and the buffers that are written over as soon as they are not needed any more.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError
from .listed_scores import ListedScores
from .weighting import WEIGHTINGS, TargetOutcome, rank_weights


IGNORE_INDEX = -100

# Bytes of one chunk x items buffer in float32, of which a step holds one per model. Matrix products ask for tall
# chunks, and so does the gradient of the item matrix, which is read and written once per chunk.
_CHUNK_BYTES = {"cpu": 12 << 20, "cuda": 256 << 20}
_MIN_CHUNK_ROWS = 64
# Bytes of one slice x items buffer, of which a step holds three at most. On a CPU they should stay in the caches; on a
# GPU launch overhead asks for more.
_SLICE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
# Bytes of items that go into one float32 product of scores on a CPU: those of a whole catalogue at once take up to
# twice as long, since MKL first repacks them all into memory of its own.
_SCORE_BLOCK_BYTES = 256 << 10
# Bytes of the item matrix's gradient in float32 that one half-precision product on a CPU adds to: the product, and its
# copy in float32, are then added while they are in the caches, and need no memory to speak of.
_GRADIENT_BLOCK_BYTES = 4 << 20


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
class LossSettings:
    """What a walk over the positions has to know; the arguments of [`distillation_loss`] have the same names."""

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

    @property
    def exponent_scale(self) -> float:
        """What makes a score an exponent to the base 2 of its softened distribution."""
        return 1 / (self.temperature * math.log(2))


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
) -> DistillationLoss:
    r"""
    Next-item cross-entropy plus sample-weighted KL against a frozen teacher, over all items.

    $$L = \frac{1}{n} \sum_i \mathrm{CE}_i + \lambda\, T^2\, w_i\, \mathrm{KL}\left(\mathrm{softmax}(t_i / T)\,\|\,
    \mathrm{softmax}(s_i / T)\right)$$

    The padding item (row 0 of both matrices) is outside both distributions. Softmaxes, losses, ranks and sums are in
    float32 whatever the inputs are; gradients come back in the inputs' dtypes. Matrix products are in float32 too,
    except under autocast (`--bf16`), where they are in its dtype and the gradients' relative error stays below 1e-2;
    the true item's own score is computed in float32 even then. Memory beyond inputs and gradients is one buffer of
    `chunk_size x N` scores per model and, under autocast, a copy of both item matrices in its dtype.

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

    Returns:
        [`DistillationLoss`]

    Raises:
        ConfigurationError: shapes that do not fit, labels outside 1..N, a teacher over another catalogue, a
            temperature that is not positive, an unknown weighting.

    Source: LLMD4Rec (arXiv 2505.18120), `L_down` and `L_up`. Computing the gradient in the forward pass, chunk by
    chunk, follows the idea of Liger-Kernel's fused linear losses.
    """
    check_options(temperature, weighting, rank_base)
    _check_shapes(hidden, item_matrix, labels, teacher_hidden, teacher_item_matrix)
    check_lists(teacher_lists, len(labels), item_matrix.shape[0] - 1, teacher_hidden)
    teacher = teacher_hidden if teacher_lists is None else teacher_lists
    keep = labels != IGNORE_INDEX
    kept = labels[keep]
    check_labels(kept, item_matrix.shape[0] - 1, f" (or {IGNORE_INDEX} to ignore a position)")
    if kept.numel() < labels.numel():
        hidden = hidden[keep]
        teacher = None if teacher is None else teacher[keep]
    settings = LossSettings(
        temperature=1.0 if teacher is None else float(temperature),
        kl_weight=float(kl_weight),
        weighting=weighting,
        rank_base=rank_base,
        scale_by_temperature_squared=scale_by_temperature_squared,
        chunk_size=chunk_size or default_chunk_size(item_matrix.shape[0] - 1, hidden.device),
        matmul_dtype=autocast_dtype(hidden.device.type),
    )
    divisor = max(kept.numel(), 1) if num_items_in_batch is None else num_items_in_batch
    walk = functools.partial(
        _Walk, labels=kept, teacher=teacher, teacher_item_matrix=teacher_item_matrix, settings=settings
    )
    result = loss_of_walk(walk, hidden, item_matrix, divisor, settings.kl_weight)
    result.student_ranks = _spread(result.student_ranks, keep)
    result.teacher_ranks = None if teacher is None else _spread(result.teacher_ranks, keep)
    return result


def loss_of_walk(walk, hidden, item_matrix, divisor, kl_weight: float) -> DistillationLoss:
    """
    The loss that a walk over the positions finds, with its gradients.

    Args:
        walk (`Callable`): makes an object with the attributes of [`_Walk`], which its `run` fills, out of `hidden`,
            `item_matrix` and `need_gradients`.
        hidden, item_matrix (`torch.Tensor`): what the gradients are for.
        divisor (`int`, `float` or `torch.Tensor`): what the summed losses are divided by.
        kl_weight (`float`): weight of the KL term against cross-entropy.
    """
    if not torch.is_grad_enabled():
        # Inside an autograd function gradients are always off, so it can only see whether its inputs ask for them.
        hidden, item_matrix = hidden.detach(), item_matrix.detach()
    return DistillationLoss(*_ChunkedLoss.apply(hidden, item_matrix, walk, divisor, kl_weight))


def default_chunk_size(num_items: int, device: torch.device | str) -> int:
    """Rows per chunk so that one chunk x items buffer of float32 stays within the device's budget."""
    return max(_MIN_CHUNK_ROWS, _rows(_CHUNK_BYTES, num_items, device))


def default_slice_size(num_items: int, device: torch.device | str) -> int:
    """Rows per slice, likewise for what is computed between matrix products."""
    return _rows(_SLICE_BYTES, num_items, device)


def _rows(budgets: dict[str, int], num_items: int, device: torch.device | str) -> int:
    return max(1, budgets.get(torch.device(device).type, budgets["cuda"]) // (4 * num_items))


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


class _Walk:
    """
    One pass over all positions. Matrix products are taken in chunks of many rows, which they want; everything between
    them in slices of few, which stay in the caches of a CPU. Nothing but float32 is computed with between products.

    Attributes:
        ranks (two `torch.LongTensor` of shape `(P,)`): the true items' under the student and under the teacher.
        cross_entropy, kl, weights, agreement (`torch.FloatTensor` of shape `(P,)`): as in [`DistillationLoss`], per
            position and undivided.
        gradients (`tuple` of two `torch.FloatTensor`, *optional*): of the summed loss for hidden states and items.
    """

    def __init__(self, hidden, item_matrix, need_gradients, *, labels, teacher, teacher_item_matrix, settings):
        positions, num_items = hidden.shape[0], item_matrix.shape[0] - 1
        self.settings, self.labels = settings, labels
        self.chunk_rows = max(1, min(settings.chunk_size, positions))
        self.slice_rows = min(self.chunk_rows, default_slice_size(num_items, hidden.device))
        sizes = settings.matmul_dtype, self.chunk_rows, self.slice_rows
        self.student = _Side(hidden, item_matrix, *sizes)
        self.teacher = None
        if isinstance(teacher, ListedScores):
            self.teacher = _ListedSide(teacher, num_items, self.slice_rows)
        elif teacher is not None:
            self.teacher = _Side(teacher, teacher_item_matrix, *sizes)
        empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
        self.buffer = empty(self.slice_rows, num_items)
        self.ranks = [labels.new_zeros(positions) for _ in range(2)]
        self.cross_entropy, self.kl, self.weights, self.agreement = empty(4, positions).zero_()
        self.gradients = (empty(hidden.shape), empty(item_matrix.shape).zero_()) if need_gradients else None

    def run(self) -> None:
        """Fill the attributes."""
        positions = len(self.labels)
        for start in range(0, positions, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, positions))
            self.student.multiply(chunk, self.labels)
            if self.teacher is not None:
                self.teacher.multiply(chunk, self.labels)
            for first in range(start, chunk.stop, self.slice_rows):
                self._add_slice(slice(first, min(first + self.slice_rows, chunk.stop)))
            if self.gradients is not None:
                self.student.add_gradients(*self.gradients)

    def _add_slice(self, part: slice) -> None:
        """One slice's losses and ranks. Its scores in the student's products give way to their gradient."""
        targets, scale = self.labels[part, None] - 1, self.settings.exponent_scale
        buffer = self.buffer[: len(targets)]
        student = _Exponents.of(self.student.scores(part), targets, scale, buffer)
        self.ranks[0][part] = student.ranks
        if self.teacher is None:
            numerators = student.powers.exp2_()
        else:
            teacher = _Exponents.of(self.teacher.scores(part), targets, scale, buffer)
            self.ranks[1][part] = teacher.ranks
            numerators, kl_factors = self._add_kl(part, student, teacher, buffer)
        normalizers = numerators.sum(dim=1, keepdim=True)
        self.cross_entropy[part] = normalizers.squeeze(1).log() - student.target / scale
        if self.gradients is None:
            return
        gradient = numerators.scatter_add_(1, targets, -normalizers).mul_(normalizers.reciprocal())
        if self.teacher is not None:
            gradient.addcmul_(buffer, kl_factors)
        self.student.replace_scores(part, gradient)

    def _add_kl(self, part, student, teacher, buffer):
        """
        One slice's KL, weights and agreement. Returns the numerators of the student's plain softmax, and factors of
        shape `(rows, 1)` that make KL's gradient for the student's scores of what `buffer` then holds.
        """
        temperature, kl_scale = self.settings.temperature, self.settings.kl_scale
        teacher_softened = torch.exp2(teacher.powers, out=buffer)
        teacher_sums = teacher_softened.sum(dim=1)
        # KL(p || q) = sum_i p_i (t_i - s_i) / T - lse(t / T) + lse(s / T)
        cross = teacher.powers.sub_(student.powers).mul_(teacher_softened).sum(dim=1).div_(teacher_sums)
        softened = torch.exp2(student.powers, out=teacher.powers)
        sums = softened.sum(dim=1)
        kl = cross * math.log(2) - teacher_sums.log() + sums.log()
        weights = sample_weights(student.outcome(sums), teacher.outcome(teacher_sums), self.settings)
        self.weights[part] = weights
        self.kl[part] = weights * kl * kl_scale
        ratios = (sums / teacher_sums).unsqueeze(1)
        difference = torch.addcmul(softened, teacher_softened, ratios, value=-1, out=buffer)
        if temperature == 1:
            numerators, spare = softened, student.powers
        elif temperature == 2 and self.settings.kl_weight:
            # The default, and a square costs less than a power; but its rounding is another, and with a weight of
            # zero the gradients are to be those of cross-entropy alone, bit for bit.
            numerators, spare = torch.mul(softened, softened, out=student.powers), softened
        else:
            numerators, spare = student.powers.mul_(temperature).exp2_(), softened
        # sum_i min(p_i, q_i) = 1 - sum_i |p_i - q_i| / 2
        self.agreement[part] = (1 - torch.abs(difference, out=spare).sum(dim=1) / (2 * sums)).clamp_min_(0)
        return numerators, (weights * (self.settings.kl_weight * kl_scale / temperature) / sums).unsqueeze(1)


class _Side:
    """One model's hidden states and items (without padding), and a chunk of their products in the products' dtype."""

    def __init__(self, hidden, item_matrix, dtype: torch.dtype, chunk_rows: int, slice_rows: int):
        self.exact_hidden, self.exact_items = hidden.detach(), item_matrix[1:].detach()
        self.hidden, self.items = self.exact_hidden.to(dtype), self.exact_items.to(dtype)
        self.products = self.items.new_empty(chunk_rows, len(self.items))
        self.rounded = dtype != torch.float32
        self.buffer = self.items.new_empty(slice_rows, len(self.items), dtype=torch.float32) if self.rounded else None

    def multiply(self, chunk: slice, labels: torch.Tensor) -> None:
        """Take the scores of another chunk."""
        self.chunk = chunk
        hidden, out = self.hidden[chunk], self.rows(chunk)
        if not self.rounded:
            block = self._block(_SCORE_BLOCK_BYTES)
            for items, scores in zip(self.items.split(block), out.split(block, dim=1), strict=True):
                torch.mm(hidden, items.T, out=scores)
            return
        torch.mm(hidden, self.items.T, out=out)
        # Rounded, the true item would tie with many others: both its loss and its rank want its score exact.
        self.targets = labels[chunk, None] - 1
        own = self.exact_items[self.targets.squeeze(1)].float()
        self.target_scores = torch.linalg.vecdot(self.exact_hidden[chunk].float(), own).unsqueeze(1)

    def rows(self, part: slice, of: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of the products, or of another tensor of the chunk, that belong to a part of the positions."""
        return (self.products if of is None else of)[part.start - self.chunk.start : part.stop - self.chunk.start]

    def scores(self, part: slice) -> torch.Tensor:
        """Scores of a slice in float32, to be written over."""
        scores = self.rows(part)
        if not self.rounded:
            return scores
        exact = self.rows(part, self.targets), self.rows(part, self.target_scores)
        return self.buffer[: len(scores)].copy_(scores).scatter_(1, *exact)

    def replace_scores(self, part: slice, gradient: torch.Tensor) -> None:
        """Put the gradient of a slice's scores in their place, if it is not there yet."""
        scores = self.rows(part)
        if scores.data_ptr() != gradient.data_ptr():
            scores.copy_(gradient)

    def add_gradients(self, grad_hidden: torch.Tensor, grad_items: torch.Tensor) -> None:
        """From the gradient of the chunk's scores, in their place, to those of hidden states and item matrix."""
        gradient, hidden = self.rows(self.chunk), self.hidden[self.chunk]
        if self.rounded:
            grad_hidden[self.chunk] = torch.mm(gradient, self.items)
            block = self._block(_GRADIENT_BLOCK_BYTES)
            for grad_block, columns in zip(grad_items[1:].split(block), gradient.split(block, dim=1), strict=True):
                grad_block += torch.mm(columns.T, hidden)
        else:
            torch.mm(gradient, self.items, out=grad_hidden[self.chunk])
            grad_items[1:].addmm_(gradient.T, hidden)

    def _block(self, size: int) -> int:
        """Items whose rows take so many bytes in float32; all of them on a device that gains nothing from blocks."""
        num_items, width = self.items.shape
        return max(1, size // (4 * width)) if self.items.device.type == "cpu" else num_items


class _ListedSide:
    """A teacher that is known by its lists: what the walk asks of a [`_Side`] that gets no gradient."""

    def __init__(self, lists: ListedScores, num_items: int, slice_rows: int):
        self.lists, self.num_items = lists, num_items
        self.buffer = lists.log_probs.new_empty(slice_rows, num_items + 1, dtype=torch.float32)

    def multiply(self, chunk: slice, labels: torch.Tensor) -> None:
        """Nothing: no product leads to its scores."""

    def scores(self, part: slice) -> torch.Tensor:
        """Scores of a slice in float32, to be written over."""
        return self.lists[part].dense(self.num_items, out=self.buffer[: part.stop - part.start])


@dataclass
class _Exponents:
    """
    A slice of scores as exponents to the base 2, which cost a third of those to the base e on a CPU.

    Attributes:
        powers (`torch.Tensor` of shape `(rows, N)`): `2**powers` are the numerators of the softened distribution; the
            largest of a row is 1.
        target (`torch.Tensor` of shape `(rows,)`): the true item's.
        ranks (`torch.LongTensor` of shape `(rows,)`): the true item's rank.
    """

    powers: torch.Tensor
    target: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def of(cls, scores: torch.Tensor, targets: torch.Tensor, scale: float, buffer: torch.Tensor) -> _Exponents:
        """From scores, in their place."""
        # Counting "at least as good" counts the target itself once and every tie against it. Floats are compared and
        # added up six times faster than booleans, and whole numbers exactly up to 2**24.
        exact = torch.float32 if scores.shape[1] < 2**24 else torch.float64
        ranks = torch.ge(scores, scores.gather(1, targets), out=buffer).sum(dim=1, dtype=exact).long()
        powers = torch.add(scores.amax(dim=1, keepdim=True) * -scale, scores, alpha=scale, out=scores)
        return cls(powers, powers.gather(1, targets).squeeze(1), ranks)

    def outcome(self, sums: torch.Tensor) -> TargetOutcome:
        """What becomes of the true items, given the sums of the numerators."""
        return TargetOutcome(self.ranks, self.target * math.log(2) - sums.log())


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype of matrix products: float32 but under autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32


def sample_weights(student: TargetOutcome, teacher: TargetOutcome, settings: LossSettings) -> torch.Tensor:
    """How much the student listens at each position, of shape `(P,)`."""
    if settings.weighting == "rank":
        return rank_weights(student.ranks, teacher.ranks, settings.rank_base)
    return WEIGHTINGS[settings.weighting](student, teacher)


def _spread(ranks: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Ranks of the kept positions back at their places, 0 at ignored ones."""
    return ranks if ranks.numel() == keep.numel() else ranks.new_zeros(keep.shape).masked_scatter_(keep, ranks)


def check_options(temperature: float, weighting: str, rank_base: int) -> None:
    """Raise for settings that no loss can be computed with."""
    if not temperature > 0:
        raise ConfigurationError(f"temperature must be positive, got {temperature!r}.")
    if weighting not in WEIGHTINGS:
        raise ConfigurationError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    if rank_base not in (0, 1):
        raise ConfigurationError(f"rank_base must be 0 or 1, got {rank_base!r}.")


def check_labels(labels: torch.Tensor, num_items: int, or_else: str = "") -> None:
    """Raise for labels that are no items, and say what they may be beside them."""
    if labels.numel() and not (1 <= int(labels.min()) and int(labels.max()) <= num_items):
        raise ConfigurationError(
            f"labels must be in 1..{num_items}{or_else}, got {int(labels.min())}..{int(labels.max())}."
        )


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
