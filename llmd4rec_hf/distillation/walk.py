# SPDX-License-Identifier: Apache-2.0
"""
The walk over the positions that a loss over all items is made of: chunks of scores, and what becomes of them.

On a CPU half of the time is matrix products, and most of the rest is memory traffic over the scores, so they are read
and written as rarely as possible: scores are kept as exponents to the base 2, rows are shifted only if float32 would
overflow, rows are never normalised (what their gradient is multiplied with is divided instead), and buffers are reused
in place.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..evaluation.ranking import count_at_least
from .listed_scores import ListedScores
from .weighting import TargetOutcome, sample_weights


# Bytes of one chunk x items buffer in the products' dtype, of which a step holds one per model. Matrix products ask
# for tall chunks, and so does the gradient of the item matrix, which is read and written once per chunk. But a buffer
# that a CPU's caches do not hold, on some from 9 MB on, halves the rate of narrow products.
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_MIN_CHUNK_ROWS = 64
# Bytes of one slice x items buffer, of which a step holds three at most: on a CPU for each of its threads, and so few
# that they stay in its core's own cache; on a GPU launch overhead asks for more.
_SLICE_BYTES = {"cpu": 512 << 10, "cuda": 256 << 20}
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
    def kl_factor(self) -> float:
        """The factor of `w (q - p)` in the gradient for the student's scores."""
        return self.kl_weight * self.kl_scale / self.temperature

    @property
    def exponent_scale(self) -> float:
        """What makes a score an exponent to the base 2 of its softened distribution."""
        return 1 / (self.temperature * math.log(2))


def default_chunk_size(num_items: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> int:
    """Rows per chunk so that one chunk x items buffer of the products' dtype stays within the device's budget."""
    return max(_MIN_CHUNK_ROWS, _rows(_CHUNK_BYTES, num_items, device, dtype))


def default_slice_size(num_items: int, device: torch.device | str) -> int:
    """Rows per slice, likewise for what is computed between matrix products, in float32."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    return _rows(_SLICE_BYTES, num_items, device, torch.float32, threads)


def _rows(budgets: dict[str, int], num_items: int, device, dtype: torch.dtype, times: int = 1) -> int:
    return max(1, times * budgets.get(torch.device(device).type, budgets["cuda"]) // (dtype.itemsize * num_items))


class Walk:
    """
    One pass over all positions. Matrix products are taken in chunks of many rows, which they want; everything between
    them in slices of few, which stay in the caches of a CPU. What a slice's gradient does not depend on is left until
    all are gone through, since calls cost more than numbers there. Nothing but float32 is computed with between
    products.

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
        self.student = _ScoredSide(self.targets, hidden, item_matrix, *sizes)
        self.teacher = None
        if isinstance(teacher, ListedScores):
            self.teacher = _ListedSide(self.targets, teacher, num_items, settings.exponent_scale, self.slice_rows)
        elif teacher is not None:
            self.teacher = _ScoredSide(self.targets, teacher, teacher_item_matrix, *sizes)
        self.shifted = not self._within_float32()
        empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
        self.buffer = empty(self.slice_rows, num_items)
        # Sums over the items, of shape `(rows, 1)`, a slice each: those of the student's plain softmax, and beside a
        # teacher what `_add_kl` puts together.
        self.normalizers: list[torch.Tensor] = []
        self.kl_sums: list[tuple[torch.Tensor, ...]] = []
        self.ranks = [labels.new_zeros(positions) for _ in range(2)]
        self.cross_entropy, self.kl, self.weights, self.agreement = empty(4, positions).zero_()
        self.gradients = (empty(hidden.shape), empty(item_matrix.shape).zero_()) if need_gradients else None

    def _within_float32(self) -> bool:
        """Whether no row needs a shift, by what the largest of its exponents can be."""
        sides = [side for side in (self.student, self.teacher) if side is not None]
        # Read at once, since a GPU is waited for.
        student, *teacher = torch.stack([side.largest_exponent() for side in sides]).tolist()
        plain, teacher = student * max(1.0, self.settings.temperature), sum(teacher)
        return max(plain, teacher) <= _LARGEST_EXPONENT and student + teacher <= _LARGEST_SUM_OF_EXPONENTS

    def run(self) -> None:
        """Fill the attributes."""
        positions = len(self.targets)
        for start in range(0, positions, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, positions))
            self.student.multiply(chunk)
            if self.teacher is not None:
                self.teacher.multiply(chunk)
            slices = range(start, chunk.stop, self.slice_rows)
            for first in slices:
                self._add_slice(slice(first, min(first + self.slice_rows, chunk.stop)))
            if self.gradients is not None:
                self.student.add_gradients(torch.cat(self.normalizers[-len(slices) :]), *self.gradients)
        if positions:
            self._find_losses()

    def _find_losses(self) -> None:
        """From sums over the items to losses and ranks."""
        settings = self.settings
        targets = self.student.target_exponents.squeeze(1) / settings.exponent_scale
        self.cross_entropy = _joined(self.normalizers).log() - targets
        if settings.count_ranks:
            sides = [side for side in (self.student, self.teacher) if side is not None]
            self.ranks[: len(sides)] = [_joined(side.counts).long() for side in sides]
        if self.teacher is None:
            return
        sums, teacher_sums, cross, distances, self.weights = map(_joined, zip(*self.kl_sums, strict=True))
        # KL(p || q) = sum_i p_i (t_i - s_i) / T - lse(t / T) + lse(s / T)
        kl = cross / teacher_sums * math.log(2) - teacher_sums.log() + sums.log()
        self.kl = self.weights * kl * settings.kl_scale
        # sum_i min(p_i, q_i) = 1 - sum_i |p_i - q_i| / 2
        self.agreement = (1 - distances / (2 * sums)).clamp_min_(0)

    def _add_slice(self, part: slice) -> None:
        """One slice's sums and ranks. Its scores in the student's products give way to their gradient."""
        buffer = self.buffer[: part.stop - part.start]
        student = self._exponents(self.student, part, buffer)
        if self.teacher is None:
            numerators = student.exp2_()
        else:
            teacher = self._exponents(self.teacher, part, buffer)
            numerators, kl_factors = self._add_kl(part, student, teacher, buffer)
        normalizers = _row_sums(numerators)
        self.normalizers.append(normalizers)
        if self.gradients is None:
            return
        gradient = numerators.scatter_add_(1, self.targets[part], -normalizers)
        if self.teacher is not None:
            factor = self.settings.kl_factor
            gradient = torch.addcmul(gradient, buffer, kl_factors * normalizers, value=factor, out=student)
        self.student.replace_scores(part, gradient, normalizers)

    def _exponents(self, side: _Side, part: slice, buffer: torch.Tensor) -> torch.Tensor:
        """A slice of one model's, to be written over, as is the buffer; the true items' ranks are put down."""
        exponents = side.exponents(part)
        target = side.target_exponents[part]
        if self.settings.count_ranks:
            side.counts.append(count_at_least(exponents, target, buffer))
        if self.shifted:
            largest = exponents.amax(dim=1, keepdim=True)
            exponents.sub_(largest)
            target.sub_(largest)
        return exponents

    def _add_kl(self, part, student, teacher, buffer):
        """
        Put down the sums that a slice's KL, weights and agreement are made of, given both models' exponents. Returns
        the numerators of the student's plain softmax, and `factors` of shape `(rows, 1)`: the gradient of KL for the
        student's scores is `kl_factor * factors * buffer`.
        """
        temperature, settings = self.settings.temperature, self.settings
        teacher_softened = torch.exp2(teacher, out=buffer)
        teacher_sums = _row_sums(teacher_softened)
        cross = _row_sums(teacher.sub_(student).mul_(teacher_softened))
        softened = torch.exp2(student, out=teacher)
        sums = _row_sums(softened)
        difference = torch.addcmul(softened, teacher_softened, sums / teacher_sums, value=-1, out=buffer)
        if temperature == 1:
            numerators, spare = softened, student
        elif temperature == 2 and settings.kl_weight:
            # The default, and a square costs less than a power; but its rounding is another, and with a weight of
            # zero the gradients are to be those of cross-entropy alone, bit for bit.
            numerators, spare = torch.mul(softened, softened, out=student), softened
        else:
            numerators, spare = student.mul_(temperature).exp2_(), softened
        distances = _row_sums(torch.abs(difference, out=spare))
        weights = self._weights(part, sums, teacher_sums)
        self.kl_sums.append((sums, teacher_sums, cross, distances, weights))
        return numerators, weights / sums

    def _weights(self, part: slice, sums: torch.Tensor, teacher_sums: torch.Tensor) -> torch.Tensor:
        """How much the student listens, of shape `(rows, 1)`, by what becomes of the slice's true items."""
        outcomes = self._outcome(self.student, part, sums), self._outcome(self.teacher, part, teacher_sums)
        weights = sample_weights(*outcomes, self.settings.weighting, self.settings.rank_base)
        return weights.to(torch.float32).expand(len(sums)).unsqueeze(1)

    def _outcome(self, side: _Side, part: slice, sums: torch.Tensor) -> TargetOutcome:
        """What becomes of the true items of the slice at hand. The paper's weights ask for ranks alone."""
        ranks = side.counts[-1].squeeze(1).long() if side.counts else torch.zeros_like(self.targets[part, 0])
        if self.settings.weighting == "rank":
            return TargetOutcome(ranks, log_probs=None)
        log_probs = (side.target_exponents[part] * math.log(2) - sums.log()).squeeze(1)
        return TargetOutcome(ranks, log_probs)


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """Of shape `(rows, 1)`."""
    return values.sum(dim=1, keepdim=True)


def _joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """All slices' `(rows, 1)` as one `(P,)`."""
    return torch.cat(columns).squeeze(1)


class _Side:
    """
    What the walk keeps of one model.

    Attributes:
        target_exponents (`torch.FloatTensor` of shape `(P, 1)`): the true items' scores as exponents to the base 2,
            which cost a third of those to the base e on some CPUs: `2**exponents` are the numerators of the softened
            distribution. Where rows are shifted, those of slices that are gone through are relative to the largest.
        counts (`list` of `torch.Tensor` of shape `(rows, 1)`): a slice each, of the items that reach the true one:
            its rank. Empty where they are not counted.
    """

    def __init__(self, targets: torch.Tensor):
        self.targets, self.counts = targets, []
        self.target_exponents = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)


class _ScoredSide(_Side):
    """
    Hidden states and items (without padding), and a chunk of their products in the products' dtype: first the scores
    as exponents, then the scores' gradient, up to one factor per row.
    """

    def __init__(
        self, targets, hidden, item_matrix, scale: float, dtype: torch.dtype, chunk_rows: int, slice_rows: int
    ):
        super().__init__(targets)
        self.hidden, self.exact_items, self.scale = hidden.detach(), item_matrix[1:].detach(), scale
        self.items = self.exact_items.to(dtype)
        self.products = self.items.new_empty(chunk_rows, len(self.items))
        self.rounded = dtype != torch.float32
        self.buffer = self.items.new_empty(slice_rows, len(self.items), dtype=torch.float32) if self.rounded else None

    def largest_exponent(self) -> torch.Tensor:
        """What the size of none of the exponents exceeds, by the lengths of the vectors (Cauchy-Schwarz)."""
        lengths = (torch.linalg.vector_norm(vectors, dim=1) for vectors in (self.hidden, self.exact_items))
        return self.scale * math.prod((of_one.amax() if len(of_one) else of_one.sum()).float() for of_one in lengths)

    def multiply(self, chunk: slice) -> None:
        """Take the exponents of another chunk."""
        self.chunk = chunk
        scaled, out = self.hidden[chunk].float() * self.scale, self.rows(chunk)
        hidden, targets = scaled.to(self.items.dtype), self.targets[chunk]
        if self.rounded:
            torch.mm(hidden, self.items.T, out=out)
            # Rounded, the true item would tie with many others: both its loss and its rank want its score exact.
            own = self.exact_items[targets.squeeze(1)].float()
            self.target_exponents[chunk] = torch.linalg.vecdot(scaled, own).unsqueeze(1)
            return
        block = self._block(_SCORE_BLOCK_ITEMS)
        for items, exponents in zip(self.items.split(block), out.split(block, dim=1), strict=True):
            torch.mm(hidden, items.T, out=exponents)
        self.target_exponents[chunk] = out.gather(1, targets)

    def rows(self, part: slice) -> torch.Tensor:
        """The rows of the products that belong to a part of the positions."""
        return self.products[part.start - self.chunk.start : part.stop - self.chunk.start]

    def exponents(self, part: slice) -> torch.Tensor:
        """Those of a slice in float32, to be written over."""
        exponents = self.rows(part)
        if not self.rounded:
            return exponents
        exact = self.targets[part], self.target_exponents[part]
        return self.buffer[: len(exponents)].copy_(exponents).scatter_(1, *exact)

    def replace_scores(self, part: slice, gradient: torch.Tensor, divisors: torch.Tensor) -> None:
        """
        Put the gradient of a slice's scores in their place. In float32 it is there already: `exponents` has given out
        the products themselves, and it was computed in them.

        Args:
            gradient (`torch.Tensor` of shape `(rows, N)`): in float32.
            divisors (`torch.Tensor` of shape `(rows, 1)`): what its rows are still to be divided by.
        """
        if self.rounded:
            self.rows(part).copy_(gradient.div_(divisors) if self._divides_at_once else gradient)

    @property
    def _divides_at_once(self) -> bool:
        """Whether undivided gradients could be too large: 65,504 is the largest number of 16 bits."""
        return self.items.dtype == torch.float16

    def add_gradients(self, divisors: torch.Tensor, grad_hidden: torch.Tensor, grad_items: torch.Tensor) -> None:
        """
        From the gradient of the chunk's scores, in their place, to those of hidden states and item matrix. Its rows
        are divided only here, by `divisors` of shape `(rows, 1)`, since a hidden state has fewer numbers.
        """
        gradient = self.rows(self.chunk)
        factors = torch.ones_like(divisors) if self._divides_at_once else divisors.reciprocal()
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


class _ListedSide(_Side):
    """A teacher that is known by its lists: what the walk asks of a [`_ScoredSide`] that gets no gradient."""

    def __init__(self, targets, lists: ListedScores, num_items: int, scale: float, slice_rows: int):
        super().__init__(targets)
        self.lists, self.num_items, self.scale = lists, num_items, scale
        self.buffer = lists.log_probs.new_empty(slice_rows, num_items + 1, dtype=torch.float32)

    def largest_exponent(self) -> torch.Tensor:
        """What the size of a row's largest exponent does not exceed: no item of N has less than 1/N."""
        return self.lists.log_probs.new_tensor(math.log(self.num_items) * self.scale, dtype=torch.float32)

    def multiply(self, chunk: slice) -> None:
        """Nothing: no product leads to its scores."""

    def exponents(self, part: slice) -> torch.Tensor:
        """Those of a slice in float32, to be written over."""
        exponents = self.lists[part].dense(self.num_items, out=self.buffer[: part.stop - part.start]).mul_(self.scale)
        self.target_exponents[part] = exponents.gather(1, self.targets[part])
        return exponents


def autocast_dtype(device_type: str) -> torch.dtype:
    """The dtype of matrix products: float32 but under autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else torch.float32
