# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing, peak memory, and result files that say what made them."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


RESULTS = Path(__file__).parent / "results"
PACKAGES = ("llmd4rec-hf", "torch", "transformers", "accelerate", "datasets", "liger-kernel", "recbole", "rectools")


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def interleaved_seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """
    Median wall time of each function, called in turns after one call that is not counted, so that a machine whose
    speed drifts slows all of them alike.
    """
    return {name: times["seconds"] for name, times in interleaved_times(functions, repeats).items()}


def interleaved_times(
    functions: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True
) -> dict[str, dict[str, float]]:
    """
    As [`interleaved_seconds`], with the median time on processors beside it: `seconds` and `processor_seconds`. What
    else runs on the machine takes turns with the first, and slows the second by its use of caches and memory alone.
    Calls of many seconds need no `warm_up`.
    """
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    times = {name: {clock: [] for clock in clocks} for name in functions}
    for function in functions.values() if warm_up else ():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            starts = {clock: read() for clock, read in clocks.items()}
            function()
            for clock, read in clocks.items():
                times[name][clock].append(read() - starts[clock])
    return {name: {clock: statistics.median(values) for clock, values in of.items()} for name, of in times.items()}


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """
    How far a call raises this process's resident memory above where it was before, on Linux. To be called once per
    process, before anything else has raised the peak: allocators keep what they once had.
    """
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}: memory is measured on Linux alone.")


def in_own_process(script: str, *words: str) -> dict:
    """Run a benchmark script in a process of its own and read the JSON of its last line."""
    command = [sys.executable, script, *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
    return json.loads(output.strip().splitlines()[-1])


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict:
    """What the benchmark ran on."""
    facts = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["vector"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_result(name: str, result: dict) -> None:
    """Write `results/<name>.json` with the command, the machine and the versions that made it."""
    RESULTS.mkdir(exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    content = {"command": command, "machine": machine(), "versions": installed_versions(), **result}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"written: {path.relative_to(Path(__file__).parent.parent)}")


def matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Floating-point operations per second of one matrix product of this shape on this machine."""
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / median_seconds(lambda: left @ right.T, 7)
