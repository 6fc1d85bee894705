# SPDX-License-Identifier: Apache-2.0
"""
The walk on a CPU with numba: what torch does between the products in a dozen operations, each of which reads and
writes every score, is two loops that are compiled for the processor at hand. The loss takes it where numba is there.
"""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import prange
from numba.extending import overload

from .walk import Walk


if numba.config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT keeps its loops from being compiled.")

_float, _int, _half = np.float32, np.int32, np.int16
# Numbers are added up in float32 in blocks of so many, and blocks in float64.
_BLOCK = 1024
# What is added to it is rounded to a whole number, which stands in its lowest bits.
_ROUNDER = _float(1.5 * 2**23)
# Below this, 2**x is not a normal number.
_SMALLEST = _float(-126)
# Of the series of 2**x.
_C1, _C2, _C3, _C4, _C5, _C6 = (_float(math.log(2) ** n / math.factorial(n)) for n in range(1, 7))
# An exponent that adds nothing to a sum, reaches no target and is a number, which infinity is not.
_NOTHING = -1e30
# Where there is no OpenMP, numba falls back on threads of its own, which end the process if two callers ask for them
# at once.
_THREADS = threading.Lock()


class CompiledWalk(Walk):
    """
    One pass over all positions as [`Walk`] describes it, by as many threads as torch has: over scores in float32 or
    bf16, which the loops read and write as they are.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The loops need no memory of their own that caches would have to hold.
        self.slice_rows = self.chunk_rows

    def _add_slice(self, part: slice) -> None:
        settings, targets = self.settings, self.targets[part]
        # Not `torch.empty`, whose dtype and device are anyone's to set.
        columns, empty = targets.numpy(), self.student.target_exponents.new_empty
        student, temperature = self._scores(self.student, part), _float(settings.temperature)
        if self.teacher is None:
            counts, normalizers = torch.empty_like(targets), empty(targets.shape)
            _exponentiate(temperature, *student, columns, counts.numpy(), normalizers.numpy())
            self._record(self.student, part, counts, student)
            self.normalizers.append(normalizers)
            return
        teacher = self._scores(self.teacher, part)
        counts, results = targets.new_empty(2, *targets.shape), empty(4, *targets.shape)
        # At the default temperature the plain softmax is the square of the softened one, which costs less.
        power = None if temperature == 2 else temperature
        _soften(power, *student, *teacher, *counts.numpy(), *results.numpy())
        sums, teacher_sums, cross, normalizers = results
        self._record(self.student, part, counts[0], student)
        self._record(self.teacher, part, counts[1], teacher)
        weights = self._weights(part, sums, teacher_sums)
        factors, distances = settings.kl_factor * weights / sums * normalizers, torch.empty_like(sums)
        given = (sums / teacher_sums).numpy(), factors.numpy(), normalizers.numpy()
        if settings.kl_weight:
            _mix(power, *student, *teacher, columns, *given, distances.numpy())
        else:
            # The gradients are to be those of cross-entropy alone, bit for bit: of the same loop. Distances are the
            # same from the other side, but for the scale, and what else is left there is not looked at.
            ratios = teacher_sums / sums
            _mix(power, *teacher, *student, columns, ratios.numpy(), *given[1:], distances.numpy())
            distances /= ratios
            _exponentiate(temperature, *student, columns, counts[0].numpy(), normalizers.numpy())
        self.kl_sums.append((sums, teacher_sums, cross, distances, weights))
        self.normalizers.append(normalizers)

    def _scores(self, side, part: slice) -> tuple[np.ndarray, ...]:
        """
        What the loops ask for of one model: exponents of shape `(rows, N)`, of the true items in their own place none;
        and, of shape `(rows, 1)`, the true items' exact ones, and what all are lowered by.
        """
        products, target = side.rows(part), side.target_exponents[part].clone()
        products.scatter_(1, self.targets[part], _NOTHING)
        shifts = torch.zeros_like(target)
        if self.shifted:
            # The exact exponents count: above a shift by rounded ones, a power could be beyond float32.
            torch.maximum(products.amax(dim=1, keepdim=True).float(), target, out=shifts)
        # numpy knows no bf16.
        products = products.view(torch.int16) if products.dtype == torch.bfloat16 else products
        return products.numpy(), target.numpy(), shifts.numpy()

    def _record(self, side, part: slice, counts: torch.Tensor, scores: tuple[np.ndarray, ...]) -> None:
        """What is asked for once a slice is gone through: ranks, and the true items' exponents as they are lowered."""
        if self.settings.count_ranks:
            side.counts.append(counts)
        side.target_exponents[part] -= torch.from_numpy(scores[2])


def _compile(function: Callable) -> Callable:
    """
    A loop over rows for this processor, by as many threads as torch has. There are two of it, each compiled when first
    called, since numba's threads do not bear a fork: like torch's, they are only there if they are more than one.
    """
    alone = _jit(function)
    copy = types.FunctionType(function.__code__, function.__globals__)
    copy.__qualname__ = f"{function.__qualname__}_by_threads"  # by which compiled code is kept
    shared = _jit(copy, parallel=True)

    @functools.wraps(function)
    def run(*arguments) -> None:
        threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
        if threads == 1:
            return alone(*arguments)
        of_the_caller = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            with _THREADS:
                return shared(*arguments)
        finally:
            numba.set_num_threads(of_the_caller)

    return run


def _jit(function: Callable, **options) -> Callable:
    # Sums may be taken in any order, and products and sums at once, which loops over vectors ask for; but what is not
    # a number stays none.
    options |= {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep the compiled code in can be written to
        return numba.njit(**options)(function)


def _load(stored):
    """A score in float32, whose upper half a bf16 number is."""


@overload(_load)
def _(stored):
    if stored == numba.int16:
        return lambda stored: _int(_int(stored) << _int(16)).view(_float)
    return lambda stored: stored


def _store(scores, column, value):
    """Put a number in place of a score, rounded to the nearest bf16 number where scores are those."""


@overload(_store)
def _(scores, column, value):
    if scores.dtype == numba.int16:

        def rounded(scores, column, value):
            bits = _float(value).view(_int)
            scores[column] = _half((bits + _int(0x7FFF) + ((bits >> _int(16)) & _int(1))) >> _int(16))

        return rounded

    def as_it_is(scores, column, value):
        scores[column] = value

    return as_it_is


# Without "reassoc": the rounding must not be reasoned away.
@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def _exp2(x):
    """
    `2**x` for x up to 127, to 2e-7 of itself: the power of the part that is beyond the nearest whole number, by its
    series, whose exponent that number is then added to.
    """
    x = _SMALLEST if x < _SMALLEST else x
    rounded = x + _ROUNDER
    part = x - (rounded - _ROUNDER)
    power = _C6
    power = power * part + _C5
    power = power * part + _C4
    power = power * part + _C3
    power = power * part + _C2
    power = power * part + _C1
    power = power * part + _float(1)
    return _int(_float(power).view(_int) + _int(_float(rounded).view(_int) << _int(23))).view(_float)


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy")
def _plain(power, exponent, temperature):
    """The power of the plain softmax, given that of the softened one: its square, if there is no temperature."""
    if temperature is None:  # a type of argument, for which loops are compiled without a branch
        return power * power
    return _exp2(exponent * temperature)


@_compile
def _exponentiate(temperature, scores, targets, shifts, columns, counts, sums):
    """
    Exponents, of shape `(rows, N)`, give way to the gradient of cross-entropy, up to the factor `1 / sums`. All else
    is of shape `(rows, 1)`: given the true items' exponents, in whose columns stands `_NOTHING`, what all are lowered
    by, and the true items' columns; found, how many reach the true item's, and the sums of the powers of 2 to the
    exponents times the temperature.
    """
    for row in prange(scores.shape[0]):
        target, shift, column = targets[row, 0], shifts[row, 0], columns[row, 0]
        own = _exp2((target - shift) * temperature)
        count, total = 1, np.float64(own)
        for start in range(0, scores.shape[1], _BLOCK):
            block = scores[row, start : start + _BLOCK]
            reached, part = _float(0), _float(0)
            for i in range(block.shape[0]):
                exponent = _load(block[i])
                power = _exp2((exponent - shift) * temperature)
                reached += _float(exponent >= target)
                part += power
                _store(block, i, power)
            count += int(reached)
            total += part
        counts[row, 0], sums[row, 0] = count, total
        _store(scores[row], column, own - _float(total))


@_compile
def _soften(
    temperature, scores, targets, shifts, teacher_scores, teacher_targets, teacher_shifts,
    counts, teacher_counts, sums, teacher_sums, cross, normalizers,
):  # fmt: skip
    """
    Find, for [`_mix`] to follow, the sums of both softened distributions' powers of 2, that of the teacher's times the
    difference of the exponents, and that of the student's plain distribution's. Arguments as in [`_exponentiate`].
    """
    for row in prange(scores.shape[0]):
        target, shift = targets[row, 0], shifts[row, 0]
        teacher_target, teacher_shift = teacher_targets[row, 0], teacher_shifts[row, 0]
        s, t = target - shift, teacher_target - teacher_shift
        q, p = _exp2(s), _exp2(t)
        count, teacher_count, total, teacher_total = 1, 1, np.float64(q), np.float64(p)
        cross_total = np.float64((t - s) * p)
        normalizer = np.float64(_plain(q, s, temperature))
        for start in range(0, scores.shape[1], _BLOCK):
            block, teacher_block = scores[row, start : start + _BLOCK], teacher_scores[row, start : start + _BLOCK]
            reached, teacher_reached, part, teacher_part = _float(0), _float(0), _float(0), _float(0)
            cross_part, plain_part = _float(0), _float(0)
            for i in range(block.shape[0]):
                exponent, teacher_exponent = _load(block[i]), _load(teacher_block[i])
                s, t = exponent - shift, teacher_exponent - teacher_shift
                q, p = _exp2(s), _exp2(t)
                reached += _float(exponent >= target)
                teacher_reached += _float(teacher_exponent >= teacher_target)
                part += q
                teacher_part += p
                cross_part += (t - s) * p
                plain_part += _plain(q, s, temperature)
            count += int(reached)
            teacher_count += int(teacher_reached)
            total += part
            teacher_total += teacher_part
            cross_total += cross_part
            normalizer += plain_part
        counts[row, 0], teacher_counts[row, 0], sums[row, 0] = count, teacher_count, total
        teacher_sums[row, 0], cross[row, 0], normalizers[row, 0] = teacher_total, cross_total, normalizer


@_compile
def _mix(
    temperature, scores, targets, shifts, teacher_scores, teacher_targets, teacher_shifts, columns,
    ratios, factors, normalizers, distances,
):  # fmt: skip
    """
    The student's exponents give way to the gradient of both losses, up to the factor `1 / normalizers`: `plain powers
    - normalizers * [target] + factors * (q - ratios * p)`. Finds the sums of `|q - ratios * p|`.
    """
    for row in prange(scores.shape[0]):
        shift, teacher_shift, column = shifts[row, 0], teacher_shifts[row, 0], columns[row, 0]
        ratio, factor, distance = ratios[row, 0], factors[row, 0], 0.0
        for start in range(0, scores.shape[1], _BLOCK):
            block, teacher_block = scores[row, start : start + _BLOCK], teacher_scores[row, start : start + _BLOCK]
            part = _float(0)
            for i in range(block.shape[0]):
                s = _load(block[i]) - shift
                q = _exp2(s)
                difference = q - ratio * _exp2(_load(teacher_block[i]) - teacher_shift)
                part += abs(difference)
                plain = _plain(q, s, temperature)
                _store(block, i, plain + factor * difference)
            distance += part
        s = targets[row, 0] - shift
        q = _exp2(s)
        difference = q - ratio * _exp2(teacher_targets[row, 0] - teacher_shift)
        plain = _plain(q, s, temperature)
        _store(scores[row], column, plain + factor * difference - normalizers[row, 0])
        distances[row, 0] = distance + abs(difference)
