# SPDX-License-Identifier: Apache-2.0
"""
What a teacher adds to a training step, and what our Trainer adds to the plain one, at Beauty's sizes. Batches of the
variants are the same, so ratios of steps are those of epochs. Ratios come from one run, with the variants in turns, by
processor time and by wall time; caching the teacher is once per round, and no part of a step (see `cache.py`).

    python benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import TRAINED_POWER, beauty_like_rows, make_teacher, write_result
from crm_training import common_arguments
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillTrainer,
    SASRecConfig,
    SASRecModel,
    SequenceCollator,
    TeacherCache,
)
from llmd4rec_hf.models import build_tiny_llm


ITEMS, ROWS = 12_101, 3000
# Width, how fast the size of its dimensions falls, allowed error; the last is what CRMArguments allow.
TEACHERS = {
    "teacher d=64": (64, 0.0, 0.0),
    "teacher d=1024, exact": (1024, TRAINED_POWER, 0.0),
    "teacher d=1024, narrowed": (1024, TRAINED_POWER, CRMArguments.teacher_max_error),
}
# Width and layers of the Llamas that learn, all of whose weights are trained.
LLMS = {"llm 256x2": (256, 2), "llm 768x6": (768, 6)}
CLOCKS = {"seconds": time.perf_counter, "processor_seconds": time.process_time}


class StepClock(TrainerCallback):
    """Mean time of a step, from batch to batch, without the first, in which memory is first taken."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.starts = {name: read() for name, read in CLOCKS.items()}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            steps = state.global_step - 1
            self.times = {name: (read() - self.starts[name]) / steps for name, read in CLOCKS.items()}


def time_per_step(trainer: Trainer) -> dict[str, float]:
    """Times of a step of a freshly built trainer."""
    clock = StepClock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.times


def in_turns(builders: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Median times per step of each trainer, in turns."""
    times = {name: [] for name in builders}
    for _ in range(repeats):
        for name, build in builders.items():
            times[name].append(time_per_step(build()))
    return {name: {clock: statistics.median(t[clock] for t in of) for clock in CLOCKS} for name, of in times.items()}


def make_crm() -> SASRecModel:
    """A SASRec of random weights: what a step costs does not depend on them."""
    set_seed(0)
    return SASRecModel(SASRecConfig(num_items=ITEMS))


def make_llm(width: int, layers: int) -> LLMRecommender:
    """A Llama of random weights."""
    set_seed(0)
    backbone, tokenizer = build_tiny_llm(["a user chose these items"], hidden_size=width, num_layers=layers)
    return LLMRecommender.from_backbone(backbone, ITEMS, 64, tokenizer=tokenizer)


def crm_builders(rows, caches: dict[str, TeacherCache], shared: dict) -> dict:
    """Each variant of the CRM as a function that builds its trainer."""

    def crm(teacher=None, **settings):
        return CRMTrainer(make_crm(), CRMArguments(**settings, **shared), rows, teacher=teacher)

    def plain():
        args = TrainingArguments(per_device_train_batch_size=256, learning_rate=1e-3, **shared)
        return Trainer(make_crm(), args, train_dataset=rows, data_collator=SequenceCollator(max_length=50))

    variants = {"crm": crm}
    variants |= {f"crm, {name}": lambda cache=cache: crm(cache) for name, cache in caches.items()}
    # The batches of the plain one: neither has buckets.
    like_plain = {"length_bucketing": False, "loss_normalization": "batch"}
    return variants | {"plain Trainer": plain, "our Trainer, same batches": lambda: crm(**like_plain)}


def make_pretrained_llm(name: str) -> LLMRecommender:
    """A backbone of one's own, with LoRA in all of its linear layers."""
    set_seed(0)
    return LLMRecommender.from_backbone(name, ITEMS, 64, peft_config=LoraConfig(target_modules="all-linear"))


def llm_builders(rows, cache: TeacherCache, llms: dict, shared: dict) -> dict:
    """Each variant of each LLM as a function that builds its trainer."""

    def llm(make, teacher=None):
        return MutualDistillTrainer(make(), MutualDistillArguments(**shared), rows, teacher=teacher)

    variants = {}
    for name, make in llms.items():
        variants[name] = lambda make=make: llm(make)
        variants[f"{name}, teacher d=64"] = lambda make=make: llm(make, cache)
    return variants


def measure(rows, folder: Path, options) -> tuple[dict, dict]:
    """Times of all variants, and of each teacher the width that is stored."""
    shared = common_arguments(folder / "run", options.bf16) | {"max_steps": options.steps + 1}
    caches = {
        name: TeacherCache.build(make_teacher(ITEMS, width, power), rows, folder / name, max_error=max_error)
        for name, (width, power, max_error) in TEACHERS.items()
    }
    times = in_turns(crm_builders(rows, caches, shared), options.repeats)
    llms = {name: lambda shape=shape: make_llm(*shape) for name, shape in LLMS.items()}
    if options.llm:
        llms[f"{Path(options.llm).name} with LoRA"] = lambda: make_pretrained_llm(options.llm)
    times |= in_turns(llm_builders(rows, caches["teacher d=64"], llms, shared), options.repeats)
    return times, {name: cache.manifest["hidden_size"] for name, cache in caches.items()}


def ratios_of(times: dict) -> dict[str, dict[str, float]]:
    """Each variant with a teacher to the one without, and our Trainer to the plain one."""
    pairs = [(name, name.split(",")[0]) for name in times if ", teacher" in name]
    pairs.append(("our Trainer, same batches", "plain Trainer"))
    return {f"{a} / {b}": {clock: times[a][clock] / times[b][clock] for clock in CLOCKS} for a, b in pairs}


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--llm", help="folder or Hub id of a backbone to measure as well, with LoRA")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        times, widths = measure(beauty_like_rows(ITEMS, ROWS), Path(folder), options)
    ratios = ratios_of(times)
    for name, ratio in ratios.items():
        print(f"{name:50s} {ratio['processor_seconds']:6.3f} by processor time {ratio['seconds']:6.3f} by wall time")
    write_result(
        "overhead_bf16" if options.bf16 else "overhead",
        {"items": ITEMS, "rows": ROWS, "stored_widths": widths, "per_step": times, "ratios": ratios},
    )


if __name__ == "__main__":
    main()
