# SPDX-License-Identifier: Apache-2.0
"""
The walk over the positions that a loss over all items is made of: chunks of scores, and what becomes of them.

On a CPU half of the time goes into matrix products, and most of the rest into reading and writing scores. So these
are gone through as seldom as can be: products come out as exponents to the base 2, no row is shifted where float32
holds it as it is or normalised (its hidden state is divided instead), and buffers are written over as soon as they are
not needed any more.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..evaluation.ranking import count_at_least
from .listed_scores import ListedScores
from .weighting import WEIGHTINGS, TargetOutcome, rank_weights


# Bytes of one chunk x items buffer in the products' dtype, of which a step holds one per model. Matrix products ask
# for tall chunks, and so does the gradient of the item matrix, which is read and written once per chunk. But a buffer
# that a CPU's caches do not hold, on some from 9 MB on, halves the rate of narrow products.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_MIN_CHUNK_ROWS = 64
# Bytes of one slice x items buffer, of which a step holds three at most. On a CPU they should stay in the caches; on a
# GPU launch overhead asks for more.
_SLICE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
# Items that go into one float32 product of scores on a CPU: a whole catalogue at once takes up to twice as long on
# some, since MKL first repacks it all into memory of its own, and few at once waste the rows that were read for them.
_SCORE_BLOCK_ITEMS = 1024
# Bytes of the item matrix's gradient in float32 that one half-precision product on a CPU adds to: the product, and its
# copy in float32, are then added while they are in the caches, and need no memory to speak of.
_GRADIENT_BLOCK_BYTES = 4 << 20
# Exponents to the base 2 beyond which rows are shifted by their largest one: up to these the numerators of both
# softmaxes, sums over a catalogue, and quotients of two models' sums are normal numbers in float32, that is from
# 2**-126 to 2**128.
_LARGEST_EXPONENT = 100.0
_LARGEST_SUM_OF_EXPONENTS = 120.0


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
    count_ranks: bool = True

    @property
    def kl_scale(self) -> float:
        return self.temperature**2 if self.scale_by_temperature_squared else 1.0

    @property
    def exponent_scale(self) -> float:
        """What makes a score an exponent to the base 2 of its softened distribution."""
        return 1 / (self.temperature * math.log(2))


def default_chunk_size(num_items: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> int:
    """Rows per chunk so that one chunk x items buffer of the products' dtype stays within the device's budget."""
    return max(_MIN_CHUNK_ROWS, _rows(_CHUNK_BYTES, num_items, device, dtype))


def default_slice_size(num_items: int, device: torch.device | str) -> int:
    """Rows per slice, likewise for what is computed between matrix products, in float32."""
    return _rows(_SLICE_BYTES, num_items, device, torch.float32)


def _rows(budgets: dict[str, int], num_items: int, device: torch.device | str, dtype: torch.dtype) -> int:
    return max(1, budgets.get(torch.device(device).type, budgets["cuda"]) // (dtype.itemsize * num_items))


class Walk:
    """
    One pass over all positions. Matrix products are taken in chunks of many rows, which they want; everything between
    them in slices of few, which stay in the caches of a CPU. Nothing but float32 is computed with between products.

    Attributes:
        ranks (two `torch.LongTensor` of shape `(P,)`): the true items' under the student and under the teacher; zeros
            where they are not counted.
        cross_entropy, kl, weights, agreement (`torch.FloatTensor` of shape `(P,)`): as in [`DistillationLoss`], per
            position and undivided.
        gradients (`tuple` of two `torch.FloatTensor`, *optional*): of the summed loss for hidden states and items.
    """

    def __init__(self, hidden, item_matrix, need_gradients, *, labels, teacher, teacher_item_matrix, settings):
        positions, num_items = hidden.shape[0], item_matrix.shape[0] - 1
        self.settings, self.targets = settings, labels[:, None] - 1
        self.chunk_rows = max(1, min(settings.chunk_size, positions))
        self.slice_rows = min(self.chunk_rows, default_slice_size(num_items, hidden.device))
        sizes = settings.exponent_scale, settings.matmul_dtype, self.chunk_rows, self.slice_rows
        self.student = _Side(hidden, item_matrix, *sizes)
        self.teacher = None
        if isinstance(teacher, ListedScores):
            self.teacher = _ListedSide(teacher, num_items, settings.exponent_scale, self.slice_rows)
        elif teacher is not None:
            self.teacher = _Side(teacher, teacher_item_matrix, *sizes)
        self.shifted = not self._within_float32()
        empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
        self.buffer = empty(self.slice_rows, num_items)
        self.ranks = [labels.new_zeros(positions) for _ in range(2)]
        self.cross_entropy, self.kl, self.weights, self.agreement = empty(4, positions).zero_()
        self.gradients = (empty(hidden.shape), empty(item_matrix.shape).zero_()) if need_gradients else None

    def _within_float32(self) -> bool:
        """Whether no row needs a shift, by what the largest of its exponents can be."""
        student = self.student.largest_exponent()
        plain = student * max(1.0, self.settings.temperature)
        teacher = 0.0 if self.teacher is None else self.teacher.largest_exponent()
        return max(plain, teacher) <= _LARGEST_EXPONENT and student + teacher <= _LARGEST_SUM_OF_EXPONENTS

    def run(self) -> None:
        """Fill the attributes."""
        positions = len(self.targets)
        for start in range(0, positions, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, positions))
            self.student.multiply(chunk, self.targets)
            if self.teacher is not None:
                self.teacher.multiply(chunk, self.targets)
            for first in range(start, chunk.stop, self.slice_rows):
                self._add_slice(slice(first, min(first + self.slice_rows, chunk.stop)))
            if self.gradients is not None:
                self.student.add_gradients(*self.gradients)

    def _add_slice(self, part: slice) -> None:
        """One slice's losses and ranks. Its scores in the student's products give way to their gradient."""
        targets, buffer = self.targets[part], self.buffer[: part.stop - part.start]
        student = self._exponents(self.student, self.ranks[0], part, buffer)
        if self.teacher is None:
            numerators = student.powers.exp2_()
        else:
            teacher = self._exponents(self.teacher, self.ranks[1], part, buffer)
            numerators, kl_factors = self._add_kl(part, student, teacher, buffer)
        normalizers = numerators.sum(dim=1, keepdim=True)
        self.cross_entropy[part] = normalizers.squeeze(1).log() - student.target / self.settings.exponent_scale
        if self.gradients is None:
            return
        gradient = numerators.scatter_add_(1, targets, -normalizers)
        if self.teacher is not None:
            gradient = torch.addcmul(gradient, buffer, kl_factors * normalizers, out=student.powers)
        self.student.replace_scores(part, gradient, normalizers.reciprocal())

    def _exponents(self, side, ranks: torch.Tensor, part: slice, buffer: torch.Tensor) -> _Exponents:
        """A slice of one model's, whose ranks are put down. The buffer is written over."""
        powers = side.exponents(part)
        target = powers.gather(1, self.targets[part])
        if self.settings.count_ranks:
            ranks[part] = count_at_least(powers, target, buffer)
        if self.shifted:
            largest = powers.amax(dim=1, keepdim=True)
            powers, target = powers.sub_(largest), target - largest
        return _Exponents(powers, target.squeeze(1), ranks[part])

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
    """
    One model's hidden states and items (without padding), and a chunk of their products in the products' dtype: first
    the scores as exponents to the base 2, then what row factors make the gradient of the scores of.
    """

    def __init__(self, hidden, item_matrix, scale: float, dtype: torch.dtype, chunk_rows: int, slice_rows: int):
        self.hidden, self.exact_items, self.scale = hidden.detach(), item_matrix[1:].detach(), scale
        self.items = self.exact_items.to(dtype)
        self.products = self.items.new_empty(chunk_rows, len(self.items))
        self.factors = self.items.new_empty(chunk_rows, 1, dtype=torch.float32)
        self.rounded = dtype != torch.float32
        self.buffer = self.items.new_empty(slice_rows, len(self.items), dtype=torch.float32) if self.rounded else None

    def largest_exponent(self) -> float:
        """What the size of none of the exponents exceeds, by the lengths of the vectors (Cauchy-Schwarz)."""
        lengths = (torch.linalg.vector_norm(vectors, dim=1) for vectors in (self.hidden, self.exact_items))
        return self.scale * math.prod(float(of_one.amax()) if len(of_one) else 0.0 for of_one in lengths)

    def multiply(self, chunk: slice, targets: torch.Tensor) -> None:
        """Take the exponents of another chunk."""
        self.chunk = chunk
        scaled, out = self.hidden[chunk].float() * self.scale, self.rows(chunk)
        hidden = scaled.to(self.items.dtype)
        if not self.rounded:
            block = self._block(_SCORE_BLOCK_ITEMS)
            for items, exponents in zip(self.items.split(block), out.split(block, dim=1), strict=True):
                torch.mm(hidden, items.T, out=exponents)
            return
        torch.mm(hidden, self.items.T, out=out)
        # Rounded, the true item would tie with many others: both its loss and its rank want its score exact.
        self.targets = targets[chunk]
        own = self.exact_items[self.targets.squeeze(1)].float()
        self.target_exponents = torch.linalg.vecdot(scaled, own).unsqueeze(1)

    def rows(self, part: slice, of: torch.Tensor | None = None) -> torch.Tensor:
        """The rows of the products, or of another tensor of the chunk, that belong to a part of the positions."""
        return (self.products if of is None else of)[part.start - self.chunk.start : part.stop - self.chunk.start]

    def exponents(self, part: slice) -> torch.Tensor:
        """Those of a slice in float32, to be written over."""
        exponents = self.rows(part)
        if not self.rounded:
            return exponents
        exact = self.rows(part, self.targets), self.rows(part, self.target_exponents)
        return self.buffer[: len(exponents)].copy_(exponents).scatter_(1, *exact)

    def replace_scores(self, part: slice, gradient: torch.Tensor, factors: torch.Tensor) -> None:
        """
        Put the gradient of a slice's scores in their place.

        Args:
            gradient (`torch.Tensor` of shape `(rows, N)`): may be in that place already.
            factors (`torch.Tensor` of shape `(rows, 1)`): what its rows are still to be multiplied by.
        """
        if self.items.dtype == torch.float16:  # 65,504 is the largest number
            gradient, factors = gradient.mul_(factors), torch.ones_like(factors)
        self.rows(part, self.factors).copy_(factors)
        products = self.rows(part)
        if products.data_ptr() != gradient.data_ptr():
            products.copy_(gradient)

    def add_gradients(self, grad_hidden: torch.Tensor, grad_items: torch.Tensor) -> None:
        """From the gradient of the chunk's scores, in their place, to those of hidden states and item matrix."""
        gradient, factors = self.rows(self.chunk), self.rows(self.chunk, self.factors)
        hidden = (self.hidden[self.chunk] * factors).to(self.items.dtype)
        torch.mul(torch.mm(gradient, self.items), factors, out=grad_hidden[self.chunk])
        if self.rounded:
            block = self._block(_GRADIENT_BLOCK_BYTES // (4 * self.items.shape[1]))
            for grad_block, columns in zip(grad_items[1:].split(block), gradient.split(block, dim=1), strict=True):
                grad_block += torch.mm(columns.T, hidden)
        else:
            grad_items[1:].addmm_(gradient.T, hidden)

    def _block(self, items: int) -> int:
        """So many items on a CPU; all of them on a device that gains nothing from blocks."""
        return max(1, items) if self.items.device.type == "cpu" else len(self.items)


class _ListedSide:
    """A teacher that is known by its lists: what the walk asks of a [`_Side`] that gets no gradient."""

    def __init__(self, lists: ListedScores, num_items: int, scale: float, slice_rows: int):
        self.lists, self.num_items, self.scale = lists, num_items, scale
        self.buffer = lists.log_probs.new_empty(slice_rows, num_items + 1, dtype=torch.float32)

    def largest_exponent(self) -> float:
        """What the size of a row's largest exponent does not exceed: no item of N has less than 1/N."""
        return math.log(self.num_items) * self.scale

    def multiply(self, chunk: slice, targets: torch.Tensor) -> None:
        """Nothing: no product leads to its scores."""

    def exponents(self, part: slice) -> torch.Tensor:
        """Those of a slice in float32, to be written over."""
        return self.lists[part].dense(self.num_items, out=self.buffer[: part.stop - part.start]).mul_(self.scale)


@dataclass
class _Exponents:
    """
    A slice of scores as exponents to the base 2, which cost a third of those to the base e on some CPUs.

    Attributes:
        powers (`torch.Tensor` of shape `(rows, N)`): `2**powers` are the numerators of the softened distribution.
        target (`torch.Tensor` of shape `(rows,)`): the true item's.
        ranks (`torch.LongTensor` of shape `(rows,)`): the true item's rank.
    """

    powers: torch.Tensor
    target: torch.Tensor
    ranks: torch.Tensor

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
