# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing, peak memory, and result files that say what made them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed

from llmd4rec_hf import SASRecConfig, SASRecModel
from llmd4rec_hf.distillation import loss
from llmd4rec_hf.training.precision import bf16_slowdown


RESULTS = Path(__file__).parent / "results"
# Where what a benchmark measures takes place.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of bf16's products over float32's, beyond which nobody would train in it.
MAX_SLOWDOWN = 4
# With this power (see `make_teacher`) a teacher of width 1024 keeps about as many dimensions as an LLM of that width
# does that was trained on the demo: 135.
TRAINED_POWER = 0.75
PACKAGES = (
    "llmd4rec-hf",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "numba",
    "liger-kernel",
    "recbole",
    "rectools",
)


def finished(function: Callable[[], object]) -> None:
    """Call a function and wait for what it has left for the accelerator to do."""
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def by_torch_alone() -> contextlib.AbstractContextManager:
    """Where the loss does without numba, as on a GPU or where it is not installed."""
    return mock.patch.object(loss, "_MIN_COMPILED_ITEMS", math.inf)


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one call that is not counted."""
    finished(function)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        finished(function)
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
        finished(function)
    for _ in range(repeats):
        for name, function in functions.items():
            starts = {clock: read() for clock, read in clocks.items()}
            finished(function)
            for clock, read in clocks.items():
                times[name][clock].append(read() - starts[clock])
    return {name: {clock: statistics.median(values) for clock, values in of.items()} for name, of in times.items()}


def peak_extra_bytes(function: Callable[[], object]) -> int:
    """
    How far a call raises this process's resident memory above where it was before, on Linux, or what it has allocated
    on the accelerator. To be called once per process, before anything else has raised the peak: allocators keep what
    they once had.
    """
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        finished(function)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def peak_bytes() -> int:
    """Peak of this process's resident memory so far, on Linux."""
    return _status("VmHWM")


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
    processor = _cpu_facts("model name") or platform.machine()
    facts = {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    facts["vector"] = torch.backends.cpu.get_cpu_capability() + (" AMX" if "amx_bf16" in _cpu_facts("flags") else "")
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _cpu_facts(name: str) -> str:
    """What Linux says of the processor under this name; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


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
    left, right = (torch.randn(count, inner, dtype=dtype, device=DEVICE) for count in (rows, columns))
    return 2 * rows * inner * columns / median_seconds(lambda: left @ right.T, 7)


def bf16_is_too_slow() -> bool:
    """Whether this processor takes so long for bf16's products that their times are left out; says so."""
    slowdown = 0.0 if DEVICE.type == "cuda" else bf16_slowdown()
    if slowdown > MAX_SLOWDOWN:
        print(f"bf16 is left out: this processor takes {slowdown:.0f} times as long for its products.")
    return slowdown > MAX_SLOWDOWN


def beauty_like_rows(num_items: int, num_rows: int) -> Dataset:
    """Training rows of random items, as long as those of Beauty: 3 items at least and 6.9 on average."""
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / 4.9, num_rows) + 2
    rows = [random.integers(1, num_items + 1, length).tolist() for length in lengths]
    return Dataset.from_dict({"item_ids": rows, "length": lengths.tolist(), "row_id": list(range(num_rows))})


@torch.no_grad()
def make_teacher(num_items: int, width: int, power: float = 0.0) -> SASRecModel:
    """
    Random weights whose scores spread like those of a trained model (standard deviation of about 2). Its dimensions
    fall in size as this power of their number.
    """
    set_seed(width)
    model = SASRecModel(SASRecConfig(num_items=num_items, hidden_size=width, num_layers=1, dropout=0.0)).eval()
    torch.nn.init.normal_(model.item_embedding.weight, std=2 / width**0.5)
    # Without it a random model of tied embeddings is certain of the item it has just read, and certainty hides errors.
    torch.nn.init.normal_(model.final_norm.weight)
    model.item_embedding.weight.data *= torch.arange(1, width + 1) ** -power
    scores = model.encode(torch.randint(1, num_items + 1, (8, 20))) @ model.item_matrix()[1:].T
    model.item_embedding.weight.data *= 2 / scores.std()
    return model
