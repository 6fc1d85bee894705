# SPDX-License-Identifier: Apache-2.0
"""
One step of the loss, forward and backward, with a teacher and without: ours beside plain autograd and, where it is
installed, Liger-Kernel's losses on the same work. Ratios come from one run, with the variants in turns, by processor
time and by wall time; on a GPU, where sizes are larger, by wall time alone.

    python benchmarks/loss.py
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    bf16_is_too_slow,
    by_torch_alone,
    in_own_process,
    interleaved_times,
    matmul_rate,
    peak_extra_bytes,
    write_result,
)

from llmd4rec_hf import distillation_loss, rank_weights


TEMPERATURE, KL_WEIGHT, WIDTH, TEACHER_WIDTH = 2.0, 0.5, 64, 256
ON_GPU = DEVICE.type == "cuda"
# (items, positions, whether there is a teacher, whether plain autograd fits, repeats)
SIZES = {
    "cpu": (
        (12_101, 1024, True, True, 9),
        (12_101, 1024, False, True, 9),
        (200_000, 1024, True, True, 1),
        (1_000_000, 256, True, False, 1),
    ),
    "cuda": (
        (12_101, 8192, True, True, 25),
        (12_101, 8192, False, True, 25),
        (200_000, 4096, True, True, 9),
        (1_000_000, 512, True, True, 5),
    ),
}
# A product whose operands stay in a processor's caches, or keep all of a GPU busy.
RATE_SHAPE = (8192, WIDTH, 12_101) if ON_GPU else (256, WIDTH, 1024)


def make_inputs(items: int, positions: int, teacher: bool = True):
    """Random students and teachers whose scores spread like those of trained models (standard deviation of 2)."""
    random = torch.Generator(DEVICE).manual_seed(0)

    def normal(rows, width, deviation=1.0):
        return torch.randn(rows, width, generator=random, device=DEVICE) * deviation

    hidden = normal(positions, WIDTH).requires_grad_()
    item_matrix = normal(items + 1, WIDTH, 2 / WIDTH**0.5).requires_grad_()
    teacher_hidden = normal(positions, TEACHER_WIDTH)
    teacher_items = normal(items + 1, TEACHER_WIDTH, 2 / TEACHER_WIDTH**0.5)
    labels = torch.randint(1, items + 1, (positions,), generator=random, device=DEVICE)
    return hidden, item_matrix, labels, *((teacher_hidden, teacher_items) if teacher else ())


def plain_autograd(hidden, item_matrix, labels, teacher_hidden=None, teacher_items=None) -> torch.Tensor:
    """The same loss in the most direct way, with all of the scores in memory."""
    scores, targets = hidden @ item_matrix[1:].T, labels - 1
    if teacher_hidden is None:
        return F.cross_entropy(scores, targets)
    teacher_scores = teacher_hidden @ teacher_items[1:].T
    ranks, teacher_ranks = ((s >= s.gather(1, targets[:, None])).sum(1) for s in (scores.detach(), teacher_scores))
    kl = F.kl_div(
        F.log_softmax(scores / TEMPERATURE, 1),
        F.log_softmax(teacher_scores / TEMPERATURE, 1),
        log_target=True,
        reduction="none",
    ).sum(1)
    weights = rank_weights(ranks, teacher_ranks)
    return F.cross_entropy(scores, targets) + KL_WEIGHT * TEMPERATURE**2 * (weights * kl).mean()


def ours(*inputs) -> torch.Tensor:
    """The chunked loss."""
    return distillation_loss(*inputs, temperature=TEMPERATURE, kl_weight=KL_WEIGHT).loss


def ours_bf16(*inputs) -> torch.Tensor:
    """The chunked loss as it runs under bf16 training."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return ours(*inputs)


def ours_without_numba(*inputs) -> torch.Tensor:
    """The chunked loss by torch's operations."""
    with by_torch_alone():
        return ours(*inputs)


def ours_without_numba_bf16(*inputs) -> torch.Tensor:
    """Likewise under bf16 training."""
    with by_torch_alone():
        return ours_bf16(*inputs)


def plain_autograd_bf16(*inputs) -> torch.Tensor:
    """Plain autograd as it runs under bf16 training."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return plain_autograd(*inputs)


def liger_chunked():
    """Liger-Kernel's chunked forward KL with cross-entropy. It has neither weights nor ranks."""
    from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase

    class ForwardKL(LigerFusedLinearDistillationBase):
        @staticmethod
        def distillation_loss_fn(student_logits, teacher_logits, **_):
            student, teacher = F.log_softmax(student_logits, -1), F.log_softmax(teacher_logits, -1)
            return F.kl_div(student, teacher, reduction="sum", log_target=True)

        @classmethod
        def forward(cls, ctx, student_input, student_weight, teacher_input, teacher_weight, labels):
            return super().forward(
                cls, ctx, student_input, student_weight, teacher_input, teacher_weight, labels,
                chunk_size=1024 if ON_GPU else 128, compiled=ON_GPU, temperature=TEMPERATURE,
                weight_hard_loss=1.0, weight_soft_loss=KL_WEIGHT * TEMPERATURE**2,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, grad_output, *_):
            return *LigerFusedLinearDistillationBase.backward(ctx, grad_output)[:2], None, None, None

    def run(hidden, item_matrix, labels, teacher_hidden, teacher_items):
        loss = ForwardKL.apply(hidden, item_matrix[1:], teacher_hidden, teacher_items[1:], labels - 1)
        return loss[0] if isinstance(loss, tuple) else loss

    return run


def liger_triton(hidden, item_matrix, labels, teacher_hidden=None, teacher_items=None) -> torch.Tensor:
    """Liger-Kernel's Triton kernels for cross-entropy and forward KL, in turn. They have neither weights nor ranks."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    loss = LigerFusedLinearCrossEntropyLoss()(item_matrix[1:], hidden, labels - 1)
    if teacher_hidden is None:
        return loss
    divergence = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE)
    kl = divergence(hidden, item_matrix[1:], teacher_hidden, teacher_items[1:], labels - 1)
    return loss + KL_WEIGHT * TEMPERATURE**2 * kl


VARIANTS = {"ours": ours, "ours bf16": ours_bf16, "plain autograd": plain_autograd}
WITH_TEACHER_ALONE = ("liger chunked",)
if ON_GPU:
    VARIANTS["plain autograd bf16"] = plain_autograd_bf16
elif find_spec("numba"):
    VARIANTS |= {"ours without numba": ours_without_numba, "ours without numba bf16": ours_without_numba_bf16}
if find_spec("liger_kernel"):
    VARIANTS["liger chunked"] = liger_chunked()
    if ON_GPU:
        VARIANTS["liger triton"] = liger_triton


def step(name: str, inputs):
    """Forward and backward; returns the gradients."""
    inputs[0].grad = inputs[1].grad = None
    VARIANTS[name](*inputs).backward()
    return inputs[0].grad, inputs[1].grad


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference|."""
    return ((value - reference).norm() / reference.norm()).item()


def memory(name: str, items: int, positions: int, teacher: bool) -> int:
    """Bytes beyond inputs and gradients at the peak of one step. Called in a process of its own."""
    # What a process loads once: kernels, and numba with them.
    VARIANTS[name](*make_inputs(2000, 8, teacher)).backward()
    inputs = make_inputs(items, positions, teacher)
    for tensor in inputs[:2]:
        tensor.grad = torch.zeros_like(tensor)
    return peak_extra_bytes(lambda: VARIANTS[name](*inputs).backward())


def peak(name: str, items: int, positions: int, teacher: bool, threads: int) -> int:
    """[`memory`] in a process of its own."""
    words = ["--memory", name, "--items", str(items), "--positions", str(positions), "--threads", str(threads)]
    return in_own_process(__file__, *words, *(["--teacher"] if teacher else []))["bytes"]


def measure(items: int, positions: int, teacher: bool, fits: bool, repeats: int, threads: int) -> dict:
    """All variants at one size."""
    inputs, gradients = make_inputs(items, positions, teacher), {}
    names = [
        name for name in VARIANTS if name.startswith("ours") or (fits and (teacher or name not in WITH_TEACHER_ALONE))
    ]

    def run(name):
        gradients[name] = step(name, inputs)

    times = interleaved_times({name: lambda name=name: run(name) for name in names}, repeats, warm_up=repeats > 1)
    reference = gradients["plain autograd" if fits else "ours"]
    variants = {}
    for name in names:
        errors = [relative_error(a, b) for a, b in zip(gradients[name], reference, strict=True)]
        variants[name] = {
            **times[name],
            "extra_bytes": peak(name, items, positions, teacher, threads),
            "gradient_error": {"hidden": errors[0], "item_matrix": errors[1]},
        }
    teacher_width = TEACHER_WIDTH if teacher else None
    operations = 2 * positions * items * (3 * WIDTH + (teacher_width or 0))
    rates = {str(d).removeprefix("torch."): matmul_rate(*RATE_SHAPE, d) for d in (torch.float32, torch.bfloat16)}
    return {
        "items": items,
        "positions": positions,
        "width": WIDTH,
        "teacher_width": teacher_width,
        "repeats": repeats,
        "variants": variants,
        "floor_seconds": {name: operations / rate for name, rate in rates.items()},
    }


def show(result: dict) -> None:
    """Print one size as ratios to plain autograd, or to ours where that does not fit."""
    variants = result["variants"]
    base = variants.get("plain autograd", variants["ours"])
    teacher = f"d_t={result['teacher_width']}" if result["teacher_width"] else "no teacher"
    print(f"\n{result['items']:,} items, {result['positions']} positions, d={WIDTH}, {teacher}")
    clock = "seconds" if ON_GPU else "processor_seconds"
    for name, facts in variants.items():
        faster, sooner, smaller = (base[key] / max(facts[key], 1e-9) for key in (clock, "seconds", "extra_bytes"))
        print(
            f"  {name:23s} {facts[clock] * 1e3:9.1f} ms  "
            f"{faster:6.2f}x faster  {sooner:6.2f}x by wall time   "
            f"{facts['extra_bytes'] / 2**20:8.1f} MiB extra  1/{smaller:.1f}   "
            f"gradient error {max(facts['gradient_error'].values()):.1e}"
        )
    floor = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in result["floor_seconds"].items())
    print(f"  floor (operations over this machine's matmul rate): {floor}")


def main() -> None:
    """Measure every size, or, for one variant in its own process, its memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--items", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--positions", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps({"bytes": memory(options.memory, options.items, options.positions, options.teacher)}))
        return
    if bf16_is_too_slow():
        for name in [name for name in VARIANTS if name.endswith("bf16")]:
            del VARIANTS[name]
    results = []
    for size in SIZES[DEVICE.type]:
        results.append(measure(*size, options.threads))
        show(results[-1])
    write_result("loss_gpu" if ON_GPU else "loss", {"sizes": results})


if __name__ == "__main__":
    main()
