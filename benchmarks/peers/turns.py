# SPDX-License-Identifier: Apache-2.0
"""
Variants that take turns: each lives in a process of its own, works for some seconds and then waits while another one
works, so that whatever else the machine does slows all of them alike. Only the standard library: peers have their own
environments.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


class Turns:
    """
    A worker's side: it calls [`~Turns.next`] between two steps, and is held there when its turn is over.

    Args:
        facts: what the result should say of this variant, e.g. its batch size.
    """

    def __init__(self, **facts):
        # What a library prints must not come between the answers.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._facts: dict | None = facts

    def next(self, count: int = 0, **facts) -> None:
        """
        Between two steps.

        Args:
            count (`int`): positions or users of the step that has just ended; not looked at in the first call.
            facts: in the first call, more of what the result should say.
        """
        if self._facts is not None:
            self._wait(self._facts | facts)
            self._facts = None
            return
        self._count += count
        self._steps += 1
        wall, processor = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        if wall >= self._seconds:
            self._wait({"count": self._count, "steps": self._steps, "wall": wall, "processor": processor})

    def answer(self, content) -> None:
        """Say something to the other side, without taking turns."""
        print(json.dumps(content), file=self._answers, flush=True)

    def _wait(self, answer: dict) -> None:
        self.answer(answer)
        line = sys.stdin.readline()
        if not line:  # the other side has what it wants; trainers would catch an exception
            os._exit(0)
        self._seconds = float(line)
        self._count = self._steps = 0
        self._start = time.perf_counter(), time.process_time()


class Worker:
    """The other side of [`Turns`]: a command, the facts it tells, and its turns."""

    def __init__(self, command: list[str], threads: int):
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log
        )
        self.facts = self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        raise RuntimeError(f"{' '.join(self.process.args)} has died:\n{self.log.read()[-3000:]}")

    def turn(self, seconds: float) -> dict:
        """Let it work until the first step that ends after `seconds`."""
        print(seconds, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Let it end."""
        self.process.stdin.close()
        self.process.wait()


def take_turns(commands: dict[str, list[str]], seconds: float, repeats: int, threads: int = 1) -> dict[str, dict]:
    """
    Run every command's worker `repeats` times for `seconds`, in turns, after one turn that is not counted.

    Returns:
        `dict`: per variant its facts, `per_second` (the median over its turns) and `turns`.
    """
    workers = {}
    try:
        for name, command in commands.items():
            workers[name] = Worker(command, threads)
        rounds = [{name: worker.turn(seconds) for name, worker in workers.items()} for _ in range(repeats + 1)][1:]
    finally:
        for worker in workers.values():
            worker.close()
    results = {}
    for name, worker in workers.items():
        turns = [turn[name] for turn in rounds]
        speed = statistics.median(turn["count"] / turn["wall"] for turn in turns)
        results[name] = {**worker.facts, "per_second": speed, "turns": turns}
    return results


def ratios(results: dict[str, dict], base: str) -> dict[str, dict]:
    """
    How many times faster each variant is than `base`: medians over pairs of turns that followed each other, by wall
    time and by processor time. The second one leaves out the time that other processes took from a worker.
    """
    found = {}
    for name, result in results.items():
        if name == base:
            continue
        pairs = list(zip(result["turns"], results[base]["turns"], strict=True))
        found[f"{name} / {base}"] = {
            clock: statistics.median(a["count"] / a[clock] / (b["count"] / b[clock]) for a, b in pairs)
            for clock in ("wall", "processor")
        }
    return found


def show(results: dict[str, dict], found: dict[str, dict], unit: str) -> None:
    """Print speeds and ratios."""
    for name, result in results.items():
        print(f"{name:42s} {result['per_second']:10,.0f} {unit} per second")
    for name, ratio in found.items():
        print(f"{name:60s} {ratio['wall']:7.1f}x   {ratio['processor']:7.1f}x by processor time")
