# SPDX-License-Identifier: Apache-2.0
"""
What a step costs as positions P, items N and widths grow: small models of time, memory and disk, fitted to
measurements on this machine and checked at sizes that had no part in the fit. Beside them, from stated rates of a GPU,
a projection to 1e9 interactions and 1e7 items, which nobody has measured.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from common import (
    beauty_like_rows,
    bf16_is_too_slow,
    by_torch_alone,
    in_own_process,
    interleaved_times,
    make_teacher,
    peak_extra_bytes,
    write_result,
)
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmd4rec_hf import SASRecConfig, SASRecModel, TeacherCache, distillation_loss
from llmd4rec_hf.distillation import loss, walk
from llmd4rec_hf.distillation.stored_rows import row_type
from llmd4rec_hf.models import build_tiny_llm


@dataclass(frozen=True)
class Size:
    """One step of the loss; a teacher's width of 0 means none."""

    positions: int
    items: int
    width: int
    teacher_width: int
    dtype: str = "float32"


DTYPES = ("float32", "bfloat16")
FITTED = [
    Size(*shape, *widths, dtype)
    for dtype, shape, widths in product(
        DTYPES,
        ((256, 4000), (768, 4000), (256, 16_000), (768, 16_000), (512, 50_000), (128, 200_000)),
        ((32, 0), (128, 0), (32, 64), (96, 768)),
    )
]
HELD_OUT = [
    Size(*shape, dtype)
    for dtype, shape in product(
        DTYPES,
        (
            (512, 12_101, 64, 0),
            (1460, 12_101, 64, 123),
            (700, 12_101, 64, 512),
            (256, 40_000, 96, 64),
            (192, 40_000, 256, 64),
            (128, 150_000, 64, 0),
            (128, 150_000, 64, 128),
        ),
    )
]
# The smallest stands for what the libraries keep for themselves; the others are held out.
MEMORY = [
    Size(256, 2000, 64, 64, dtype) if rest is None else Size(*rest, dtype)
    for dtype, rest in product(DTYPES, (None, (256, 150_000, 64, 128)))
]
TRAFFIC_ITEMS = 20_000
# The first is fitted to, the others are held out.
BACKBONES = ((256, 2), (512, 4), (768, 6))


def make_inputs(size: Size):
    """Random students and teachers whose scores have a standard deviation of 2."""
    random = torch.Generator().manual_seed(0)

    def model(width: int):
        items = torch.randn(size.items + 1, width, generator=random) * 2 / width**0.5
        return torch.randn(size.positions, width, generator=random), items

    hidden, item_matrix = (tensor.requires_grad_() for tensor in model(size.width))
    labels = torch.randint(1, size.items + 1, (size.positions,), generator=random)
    return hidden, item_matrix, labels, *(model(size.teacher_width) if size.teacher_width else ())


def step(size: Size, inputs, **settings) -> None:
    """Forward and backward, as a trainer does them."""
    half = size.dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        loss = distillation_loss(*inputs, temperature=2.0, kl_weight=0.5, **settings).loss
    loss.backward()


# --- time ------------------------------------------------------------------------------------------------------------


def features(size: Size) -> dict[str, float]:
    """What a step's time is a sum of, each with a coefficient of its own: how often each thing is done."""
    scores = size.positions * size.items
    chunks = -(-size.positions // walk.default_chunk_size(size.items, "cpu", getattr(torch, size.dtype)))
    return {
        "score": scores,
        "score beside a teacher's": scores * (size.teacher_width > 0),
        "score and student dimension": scores * 3 * size.width,  # the scores, and both gradients
        "score and teacher dimension": scores * size.teacher_width,
        "number of an item table": size.items * (size.width * (chunks + 2) + size.teacher_width),
    }


def fit(sizes: list[Size], seconds: list[float]) -> dict[str, float]:
    """Least squares of the relative error over coefficients that are not negative: seconds for each feature."""
    rows = torch.tensor([list(features(size).values()) for size in sizes], dtype=torch.float64)
    rows /= torch.tensor(seconds, dtype=torch.float64)[:, None]
    scale = rows.norm(dim=0)
    kept = list(range(rows.shape[1]))
    while True:
        found = torch.linalg.lstsq(rows[:, kept] / scale[kept], rows.new_ones(len(rows), 1)).solution.squeeze(1)
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    solution = torch.zeros_like(scale).index_put((torch.tensor(kept),), found / scale[kept])
    return dict(zip(features(sizes[0]), solution.tolist(), strict=True))


def predict(coefficients: dict[str, float], size: Size) -> float:
    """Seconds of a step."""
    return sum(coefficients[name] * count for name, count in features(size).items())


def measure_times(sizes: list[Size], repeats: int) -> dict[Size, dict[str, float]]:
    """Times of each size, in turns."""
    shapes = {replace(size, dtype=DTYPES[0]) for size in sizes}
    inputs = {shape: make_inputs(shape) for shape in shapes}

    def run(size: Size) -> None:
        hidden, item_matrix, *others = inputs[replace(size, dtype=DTYPES[0])]
        hidden.grad = item_matrix.grad = None
        step(size, (hidden, item_matrix, *others))

    return interleaved_times({size: functools.partial(run, size) for size in sizes}, repeats, warm_up=False)


def time_model(repeats: int) -> dict:
    """The model of each dtype by processor time, with its relative errors."""
    dtypes = DTYPES[:1] if bf16_is_too_slow() else DTYPES
    measured = measure_times([size for size in FITTED + HELD_OUT if size.dtype in dtypes], repeats)
    result = {}
    for dtype in dtypes:
        fitted, held_out = ([size for size in sizes if size.dtype == dtype] for sizes in (FITTED, HELD_OUT))
        coefficients = fit(fitted, [measured[size]["processor_seconds"] for size in fitted])
        result[dtype] = {
            "seconds_per": coefficients,
            "fitted": [checked(size, measured[size], predict(coefficients, size)) for size in fitted],
            "held_out": [checked(size, measured[size], predict(coefficients, size)) for size in held_out],
        }
    return result


def checked(size: Size, times: dict[str, float], predicted: float) -> dict:
    """A measurement beside its prediction."""
    return {**asdict(size), **times, "predicted": predicted, "error": predicted / times["processor_seconds"] - 1}


# --- memory ----------------------------------------------------------------------------------------------------------


def loss_bytes(size: Size, device: str = "cpu") -> int:
    """
    Bytes of a step beyond its inputs and their gradients at its peak, which is in the walk over the chunks or, where
    the item table outweighs them, in the backward pass that scales the gradients.
    """
    half = size.dtype == "bfloat16"
    rows = min(size.positions, walk.default_chunk_size(size.items, device, getattr(torch, size.dtype)))
    slice_rows = min(rows, walk.default_slice_size(size.items, device))
    widths = [size.width] + [size.teacher_width] * (size.teacher_width > 0)
    products = len(widths) * rows * size.items * (2 if half else 4)
    by_numba = device == "cpu" and loss._compiled_walk() is not None
    slices = 0 if by_numba else (1 + len(widths) * half) * slice_rows * size.items * 4
    copies = half * sum(widths) * (size.items + size.positions) * 2
    gradients = (size.items + size.positions) * size.width * 4
    return gradients + max(products + slices + copies, gradients)


def peak(size: Size) -> int:
    """The same, measured. To be called in a process of its own."""
    small = replace(size, positions=8, items=2000)
    step(small, make_inputs(small))  # what a process loads once: kernels, and numba with them
    inputs = make_inputs(size)
    for tensor in inputs[:2]:
        tensor.grad = torch.zeros_like(tensor)
    return peak_extra_bytes(lambda: step(size, inputs))


def memory_model(threads: int) -> list[dict]:
    """Measured peaks beside the formula and, from the smallest size of a dtype, what the libraries keep."""
    found, own = [], 0
    for size in MEMORY:
        words = ["--memory", json.dumps(asdict(size)), "--threads", str(threads)]
        measured = in_own_process(__file__, *words)["bytes"]
        is_first = size.items == MEMORY[0].items
        own = measured - loss_bytes(size) if is_first else own
        predicted = loss_bytes(size) + own
        found.append({**asdict(size), "bytes": measured, "formula": loss_bytes(size), "libraries": own})
        found[-1] |= {} if is_first else {"predicted": predicted, "error": predicted / measured - 1}
    return found


# --- disk, traffic, encoders -----------------------------------------------------------------------------------------


def cache_bytes(positions: int, rows: int, items: int, width: int) -> int:
    """Bytes of a teacher cache: hidden states, where each row begins, and the item matrix."""
    return positions * row_type(width).itemsize + 8 * (rows + 1) + 4 * (items + 1) * width


def check_cache(folder: Path, items: int = 5000) -> list[dict]:
    """The formula beside caches that were written."""
    rows, found = beauty_like_rows(items, 1000), []
    for width in (64, 256):
        cache = TeacherCache.build(make_teacher(items, width), rows, folder / str(width))
        measured = sum((cache.directory / name).stat().st_size for name in cache.manifest["files"])
        predicted = cache_bytes(cache.manifest["positions"], len(rows), items, width)
        found.append({"width": width, "bytes": measured, "predicted": predicted, "error": predicted / measured - 1})
    return found


def sasrec_parameters(items: int, width: int = 64, layers: int = 2, length: int = 50) -> int:
    """Parameters of a SASRec, all of whose gradients travel between processes at every step."""
    return (items + 1 + length) * width + layers * (6 * width**2 + 10 * width) + 2 * width


def all_reduce_bytes(parameters: int, processes: int) -> float:
    """Bytes that a process sends in a step of DistributedDataParallel: a ring all-reduce of float32 gradients."""
    return 2 * (processes - 1) / processes * 4 * parameters


def all_gather_bytes(rows: int, width: int, processes: int) -> int:
    """Bytes that a process receives where the gradient of an item table holds so many rows alone, with their ids."""
    return (processes - 1) * rows * (4 * width + 8)


def check_traffic(folder: Path) -> list[dict]:
    """The formula beside what two processes send each other over the loopback device, on Linux."""
    torch.multiprocessing.spawn(traffic_worker, (folder,), nprocs=2)
    measured = json.loads((folder / "traffic.json").read_text()) / 2
    predicted = all_reduce_bytes(sasrec_parameters(TRAFFIC_ITEMS), 2)
    return [{"items": TRAFFIC_ITEMS, "bytes": measured, "predicted": predicted, "error": predicted / measured - 1}]


def traffic_worker(rank: int, folder: Path, steps: int = 4) -> None:
    """One of two processes that train a SASRec. The first writes the bytes of a step that both sent."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(SASRecModel(SASRecConfig(num_items=TRAFFIC_ITEMS)))
    items = torch.randint(1, TRAFFIC_ITEMS + 1, (8, 21))
    sent = []
    # The first steps are others: buckets are arranged anew after one.
    for count in (2, steps):
        for _ in range(count):
            model(items[:, :-1], labels=items[:, 1:]).loss.backward()
        distributed.barrier()
        sent.append(loopback_bytes())
        distributed.barrier()
    if rank == 0:
        (folder / "traffic.json").write_text(json.dumps((sent[1] - sent[0]) / steps))
    distributed.destroy_process_group()


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def check_encoders(tokens: int = 512) -> list[dict]:
    """
    Forward and backward of Llamas, beside 6 operations per parameter and token at the rate of one such product, and
    seconds per token, layer and dimension for what lies between the products: fitted to the smallest, held out are the
    others.
    """
    found, between = [], None
    for width, layers in BACKBONES:
        backbone, _ = build_tiny_llm(["a user chose these items"], hidden_size=width, num_layers=layers)
        inputs, weight = torch.randn(64, tokens // 64, width), torch.randn(2 * width, width)
        run = {
            "backbone": lambda b=backbone, i=inputs: b(inputs_embeds=i).last_hidden_state.sum().backward(),
            "product": lambda i=inputs, w=weight: i.view(-1, w.shape[1]) @ w.T,
        }
        times = interleaved_times(run, 5)
        measured, product_seconds = (times[name]["processor_seconds"] for name in run)
        count = sum(p.numel() for p in backbone.layers.parameters())
        products = 6 * count / (2 * weight.numel()) * product_seconds
        facts = {"width": width, "layers": layers, "parameters": count, "tokens": tokens, **times["backbone"]}
        facts |= {"products": products}
        if between is None:
            between = (measured - products) / (tokens * layers * width)
            found.append(facts | {"between_products": between})
            continue
        predicted = products + between * tokens * layers * width
        found.append(facts | {"predicted": predicted, "error": predicted / measured - 1})
    return found


# --- the projection --------------------------------------------------------------------------------------------------


class TensorTraffic(TorchDispatchMode):
    """
    Adds up the bytes of all tensors that operations read or write, which a GPU has to move where they outgrow its
    caches. Operations that touch but few numbers of a tensor, or none, are left out.
    """

    untouched = ("empty", "gather", "scatter")
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and not function.overloadpacket.__name__.startswith(self.untouched):
            tensors = (leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
            self.total += sum(tensor.nbytes for tensor in tensors)
        return result


@functools.cache
def bytes_per_score(width: int, teacher_width: int) -> float:
    """Bytes moved per position and item in half precision, in the smallest chunks: those of very large catalogues."""
    rows = walk._MIN_CHUNK_ROWS
    size = Size(16 * rows, 5000, width, teacher_width, "bfloat16")
    inputs = make_inputs(size)
    with by_torch_alone(), TensorTraffic() as traffic:
        step(size, inputs, chunk_size=rows)
    return traffic.total / (size.positions * size.items)


# Assumed, not measured: about an H100 with NVLink within a machine and 400 Gb/s per GPU between machines.
GPU = {
    "half_precision_operations_per_second": 989e12,
    "share_of_operations": 0.4,
    "memory_bytes_per_second": 3.35e12,
    "share_of_memory": 0.6,
    "network_bytes_per_second": 50e9,
    "share_of_network": 0.7,
}
WORLD = {"positions": 1_000_000_000, "items": 10_000_000, "rows": 20_000_000, "sample": 8192}
STEP_POSITIONS = 256 * 50  # of one GPU
GPUS = (8, 16, 32, 64)
LLM = {"width": 896, "parameters": 358_000_000}  # Qwen2.5-0.5B without its embeddings


def loss_seconds(items: int, width: int, teacher_width: int) -> float:
    """Projected seconds of one GPU per position: products and passes over memory, one after the other."""
    operations = 2 * items * (3 * width + teacher_width)
    moved = items * bytes_per_score(width, teacher_width)
    by_products = operations / (GPU["half_precision_operations_per_second"] * GPU["share_of_operations"])
    return by_products + moved / (GPU["memory_bytes_per_second"] * GPU["share_of_memory"])


def project() -> dict:
    """Hours of an epoch, seconds of a step's all-reduce, and bytes, at WORLD's size."""
    backbone = 6 * LLM["parameters"] / (GPU["half_precision_operations_per_second"] * GPU["share_of_operations"])
    seconds = {}
    for name, items in (("all items", WORLD["items"]), ("sampled items", WORLD["sample"])):
        seconds[f"crm d=64, {name}"] = loss_seconds(items, 64, 0)
        seconds[f"crm d=64, teacher of 128, {name}"] = loss_seconds(items, 64, 128)
        seconds[f"llm d={LLM['width']}, teacher of 64, {name}"] = backbone + loss_seconds(items, LLM["width"], 64)
    hours = {name: {n: s * WORLD["positions"] / n / 3600 for n in GPUS} for name, s in seconds.items()}
    parameters, network = sasrec_parameters(WORLD["items"]), GPU["network_bytes_per_second"] * GPU["share_of_network"]
    rows = WORLD["sample"] + 2 * STEP_POSITIONS  # the sample, the true items, and the items that were read
    steps = {"crm, teacher of 128": (64, 128), "llm, teacher of 64": (LLM["width"], 64)}
    sizes = {name: Size(STEP_POSITIONS, WORLD["items"], *widths, "bfloat16") for name, widths in steps.items()}
    return {
        "assumed": {"gpu": GPU, "world": WORLD, "step_positions": STEP_POSITIONS, "llm": LLM},
        "microseconds_per_position": {name: s * 1e6 for name, s in seconds.items()},
        "compute_hours_per_epoch": hours,
        "step_seconds": {name: s * STEP_POSITIONS for name, s in seconds.items()},
        "bytes_per_score": {"no teacher": bytes_per_score(64, 0), "teacher of 128": bytes_per_score(64, 128)},
        "sasrec_parameters": parameters,
        "all_reduce_bytes_per_step": {n: all_reduce_bytes(parameters, n) for n in GPUS},
        "all_reduce_seconds_per_step": {n: all_reduce_bytes(parameters, n) / network for n in GPUS},
        "sparse_gradient_bytes_per_step": {n: all_gather_bytes(rows, 64, n) for n in GPUS},
        "sparse_gradient_seconds_per_step": {n: all_gather_bytes(rows, 64, n) / network for n in GPUS},
        "cache_bytes": {w: cache_bytes(WORLD["positions"], WORLD["rows"], WORLD["items"], w) for w in (64, 128, 1024)},
        "table_bytes": {w: 4 * WORLD["items"] * w for w in (64, 128, LLM["width"], 1024)},
        "loss_bytes": {name: loss_bytes(size, "cuda") for name, size in sizes.items()},
    }


# --- the script ------------------------------------------------------------------------------------------------------


def show(result: dict) -> None:
    """Print coefficients and errors."""
    for dtype, model in result["time"].items():
        print(f"\n{dtype}: " + ", ".join(f"{s * 1e12:.3g} ps per {name}" for name, s in model["seconds_per"].items()))
        for part in ("fitted", "held_out"):
            errors = [abs(check["error"]) for check in model[part]]
            print(f"  {part}: off by {max(errors):.1%} at most, {sum(errors) / len(errors):.1%} on average")
    for name in ("time", "memory", "cache", "traffic", "encoders"):
        checks = result[name] if name != "time" else [c for m in result[name].values() for c in m["held_out"]]
        errors = ", ".join(f"{check['error']:+.1%}" for check in checks if "error" in check)
        print(f"{name}, at sizes that were not fitted: {errors}")
    print(json.dumps(result["projection"], indent=2))


def main() -> None:
    """Measure, print models and errors, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps({"bytes": peak(Size(**options.memory))}))
        return
    assert sasrec_parameters(1000) == SASRecModel(SASRecConfig(num_items=1000)).num_parameters()
    result = {"time": time_model(options.repeats), "memory": memory_model(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        result |= {"cache": check_cache(Path(folder)), "traffic": check_traffic(Path(folder))}
    result |= {"encoders": check_encoders(), "projection": project()}
    show(result)
    write_result("scaling", result)


if __name__ == "__main__":
    main()
