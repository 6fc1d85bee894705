# SPDX-License-Identifier: Apache-2.0
"""The loops that numba compiles, beside the operations of torch whose place they take; `test_loss.py` tests both."""

from __future__ import annotations

import builtins
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from dense_loss import chunked, problem

from llmd4rec_hf.distillation import ListedScores, loss
from llmd4rec_hf.distillation.walk import Walk


numba = pytest.importorskip("numba")
compiled_walk = pytest.importorskip("llmd4rec_hf.distillation.compiled_walk")

# Of items: several blocks of sums, the last of them not a whole one.
MANY = 2 * compiled_walk._BLOCK + 100


def by_both(monkeypatch, given, teacher=True, **options):
    """The results of torch, then those of numba."""
    results = []
    for least in (math.inf, 0):
        monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", least)
        results.append(chunked(given, teacher, **options))
    return results


# For several threads loops are compiled once more, for seconds each.
@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_a_catalogue_of_several_blocks(monkeypatch, teacher, shifted, dtype, threads):
    given = problem(positions=32, num_items=MANY)
    given.hidden = (given.hidden.detach() * (40 if shifted else 1)).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            (by_torch, expected), (by_numba, actual) = by_both(monkeypatch, given, teacher, temperature=2.0)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(by_numba.loss, by_torch.loss)
    torch.testing.assert_close(by_numba.agreement, by_torch.agreement, rtol=1e-4, atol=1e-6)
    assert torch.equal(by_numba.student_ranks, by_torch.student_ranks)
    assert not teacher or torch.equal(by_numba.teacher_ranks, by_torch.teacher_ranks)
    # Where a gradient is halfway between two bf16 numbers, its last bit decides which of them it becomes.
    rounding = {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(actual, expected, **rounding)


def test_threads_change_nothing(monkeypatch):
    given, results = problem(positions=33, num_items=MANY), []
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(chunked(given, temperature=2.0, chunk_size=8)[0])
    torch.set_num_threads(before)
    assert torch.equal(results[0].loss, results[1].loss)


def test_numbas_own_threads_are_as_many_as_before(monkeypatch):
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0)
    before, of_numba = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(2)
    numba.set_num_threads(1)
    try:
        chunked(problem(num_items=MANY))
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(of_numba)
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_without_weight_changes_no_bit(monkeypatch, temperature):
    given = problem(positions=32, num_items=MANY)
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0)
    _, taught = chunked(given, temperature=temperature, kl_weight=0.0)
    _, alone = chunked(given, teacher=False)
    assert all(map(torch.equal, taught, alone))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_without_weight_all_else_is_as_with_one(monkeypatch, temperature):
    given = problem(positions=32, num_items=MANY)
    (by_torch, _), (by_numba, _) = by_both(monkeypatch, given, temperature=temperature, kl_weight=0.0)
    torch.testing.assert_close(by_numba.kl, by_torch.kl)
    torch.testing.assert_close(by_numba.agreement, by_torch.agreement)
    torch.testing.assert_close(by_numba.weight_mean, by_torch.weight_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [False, True])
def test_what_is_not_a_number_shows(monkeypatch, teacher, dtype):
    given = problem(positions=8, num_items=50)
    given.items.data[7] = math.nan
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        result, grads = chunked(given, teacher)
    assert result.loss.isnan() and grads[0].isnan().any()


def test_powers_of_two():
    exponents = np.linspace(-126, 127, 10_001, dtype=np.float32)
    powers = np.array([compiled_walk._exp2(x) for x in exponents], np.float64)
    assert np.abs(powers / np.exp2(exponents.astype(np.float64)) - 1).max() < 2.5e-7
    assert all(compiled_walk._exp2(np.float32(n)) == 2.0**n for n in range(-126, 128))


@pytest.mark.parametrize("exponent", [-127.0, -1e6, -1e30, -math.inf])
def test_powers_that_are_next_to_nothing(exponent):
    assert compiled_walk._exp2(np.float32(exponent)) == 2.0**-126


def test_a_power_of_what_is_not_a_number():
    assert np.isnan(compiled_walk._exp2(np.float32(math.nan)))


def choose(items=2000, dtype=torch.float32, teacher=None, device="cpu"):
    return loss._choose_walk(torch.empty(items + 1, 1, device=device), dtype, teacher)


def test_where_it_is_taken():
    assert choose() is choose(dtype=torch.bfloat16) is choose(teacher=torch.ones(1, 1)) is compiled_walk.CompiledWalk
    lists = ListedScores(torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1))
    assert choose(100) is choose(dtype=torch.float16) is choose(teacher=lists) is choose(device="meta") is Walk


PROCESSES_AND_THREADS = """
import multiprocessing, threading, torch
from llmd4rec_hf import distillation_loss

def compute(times=1):
    for _ in range(times):
        distillation_loss(torch.ones(64, 4), torch.ones(2001, 4), torch.ones(64).long())

compute()
child = multiprocessing.get_context("fork").Process(target=compute)
child.start()
child.join(30)
print(child.exitcode)
child.kill()

def compute_by_two():
    torch.set_num_threads(2)
    compute(30)

callers = [threading.Thread(target=compute_by_two) for _ in range(2)]
for caller in callers:
    caller.start()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_forked_processes_and_two_callers_at_once():
    """
    With one thread in the parent: of torch's own, too, more would keep a child waiting. The callers meet with those of
    numba's threads that do not bear two, and are the only ones on some systems.
    """
    environment = {"OMP_NUM_THREADS": "1", "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    command, environment = [sys.executable, "-c", PROCESSES_AND_THREADS], {**os.environ, **environment}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    assert done.stdout == "0\n"


def test_ranks_that_float32_cannot_count(monkeypatch):
    monkeypatch.setattr(loss, "_MIN_COMPILED_ITEMS", 0)
    items = torch.zeros(2**24 + 2, 1)
    assert loss.distillation_loss(items[:1], items, torch.tensor([1])).student_ranks.item() == 2**24 + 1


def test_where_numba_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert loss._compiled_walk.__wrapped__() is None


def test_where_numba_cannot_be_imported(monkeypatch, caplog):
    real = builtins.__import__

    def fail(name, *args, **kwargs):
        if "compiled_walk" in name:
            raise ImportError("Numba needs NumPy 2.4 or less")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    with caplog.at_level(logging.WARNING):
        assert loss._compiled_walk.__wrapped__() is None
    assert "Numba needs NumPy 2.4 or less" in caplog.text


def test_where_nothing_is_compiled(monkeypatch, caplog):
    monkeypatch.setattr(compiled_walk.numba.config, "DISABLE_JIT", 1)
    monkeypatch.delitem(sys.modules, compiled_walk.__name__)
    with caplog.at_level(logging.WARNING):
        assert loss._compiled_walk.__wrapped__() is None
    assert "NUMBA_DISABLE_JIT" in caplog.text


def abs_of_first(values):
    return abs(values[0])


def test_where_nothing_can_be_kept(monkeypatch):
    """numba looks for a folder when a function is made, and ends there if there is none."""
    real = compiled_walk.numba.njit

    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(compiled_walk.numba, "njit", njit)
    assert compiled_walk._jit(abs_of_first).py_func is abs_of_first
