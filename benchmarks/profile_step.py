# SPDX-License-Identifier: Apache-2.0
"""
Where the time of a training step goes, at Beauty's sizes, and how far it stands above its floor: the operations of its
matrix products over the rate this machine reaches at them. By processor time, parts and whole of the same steps.

    python benchmarks/profile_step.py --bf16
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import TRAINED_POWER, beauty_like_rows, make_teacher, matmul_rate, write_result
from crm_training import common_arguments
from overhead import ITEMS, LLMS, ROWS, make_crm, make_llm
from transformers import PrinterCallback, TrainerCallback

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer, TeacherCache


PARTS = ("batches", "forward", "loss and its gradient", "backward", "clipping", "optimizer", "the rest")


class StepProfile(TrainerCallback):
    """Adds up the processor time of a trainer's parts, from the second step on."""

    def __init__(self, trainer):
        self.trainer, self.seconds, self.running = trainer, defaultdict(float), False
        self.steps = self.positions = self.padded = 0
        for owner, name, part in (
            (trainer, "get_batch_samples", "batches"),
            (trainer.model, "forward", "forward"),
            (trainer._loss_chunks, "run", "loss and its gradient"),
            (trainer.accelerator, "backward", "backward"),
            (trainer.accelerator, "clip_grad_norm_", "clipping"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name), part))

    def _timed(self, function, part: str):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[part] += (time.process_time() - start) * self.running
            if part == "batches" and self.running:
                self._count(result[0])
            return result

        return timed

    def _count(self, batches) -> None:
        self.steps += len(batches)
        self.positions += sum(int((batch["labels"] != -100).sum()) for batch in batches)
        self.padded += sum(batch["labels"].numel() for batch in batches)

    def on_step_end(self, args, state, control, **kwargs):
        # What comes first takes memory and plans for good.
        if state.global_step == 2:
            self.running, self.start = True, time.process_time()
        self.last = time.process_time()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.before_optimizer = time.process_time()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.seconds["optimizer"] += (time.process_time() - self.before_optimizer) * self.running

    def per_step(self) -> dict[str, float]:
        """Milliseconds of a step by part."""
        whole = self.last - self.start
        parts = {**self.seconds, "the rest": whole - sum(self.seconds.values())}
        return {part: parts[part] / self.steps * 1e3 for part in PARTS} | {"whole": whole / self.steps * 1e3}


def operations(model, positions: float, padded: float, teacher_width: int) -> float:
    """Multiplications and additions of a step's products: forward, and twice that backward."""
    width = model.item_matrix().shape[1]
    head = 2 * positions * ITEMS * (3 * width + teacher_width)
    # A frozen prompt's tokens and attention's own products are left out: a few hundredths.
    maps = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and len(m.weight) != ITEMS + 1
    )
    return head + 6 * maps * padded


def profile(trainer) -> dict:
    """Parts, positions and floor of a step of a freshly built trainer."""
    watch = StepProfile(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    teacher_width = 0 if trainer._teacher_items is None else trainer._teacher_items.shape[1]
    positions, padded = watch.positions / watch.steps, watch.padded / watch.steps
    work = operations(trainer.model, positions, padded, teacher_width)
    dtype = torch.bfloat16 if trainer.args.bf16 else torch.float32
    floor = work / matmul_rate(256, 64, 1024, dtype) * 1e3
    milliseconds = watch.per_step()
    return {
        "positions": positions,
        "padded_positions": padded,
        "operations": work,
        "milliseconds": milliseconds,
        "floor_milliseconds": floor,
        "times_the_floor": milliseconds["whole"] / floor,
    }


def show(name: str, found: dict) -> None:
    """Print one profile."""
    milliseconds = found["milliseconds"]
    print(f"\n{name}: {found['positions']:.0f} positions, {milliseconds['whole']:.1f} ms")
    for part in PARTS:
        print(f"  {part:24s}{milliseconds[part]:9.1f} ms {milliseconds[part] / milliseconds['whole']:7.1%}")
    print(f"  {'floor of its products':24s}{found['floor_milliseconds']:9.1f} ms   1/{found['times_the_floor']:.2f}")


def main() -> None:
    """Profile both models, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=11, help="a fresh epoch holds that many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = beauty_like_rows(ITEMS, ROWS)
    with tempfile.TemporaryDirectory() as name:
        shared = common_arguments(Path(name) / "run", options.bf16) | {"max_steps": options.steps}
        of_crm = TeacherCache.build(make_teacher(ITEMS, 64), rows, Path(name) / "crm")
        of_llm = TeacherCache.build(
            make_teacher(ITEMS, 1024, TRAINED_POWER),
            rows,
            Path(name) / "llm",
            max_error=CRMArguments.teacher_max_error,
        )
        crm, llm = CRMArguments(**shared), MutualDistillArguments(**shared)
        builders = {
            "CRM": lambda: CRMTrainer(make_crm(), crm, rows),
            "CRM, teacher of width 1024": lambda: CRMTrainer(make_crm(), crm, rows, teacher=of_llm),
            **{
                f"{name}, teacher of width 64": lambda shape=shape: MutualDistillTrainer(
                    make_llm(*shape), llm, rows, teacher=of_crm
                )
                for name, shape in LLMS.items()
            },
        }
        found = {}
        for name, build in builders.items():
            found[name] = profile(build())
            show(name, found[name])
    result = {"items": ITEMS, "rows": ROWS, "bf16": options.bf16, "profiles": found}
    write_result("profile_step_bf16" if options.bf16 else "profile_step", result)


if __name__ == "__main__":
    main()
