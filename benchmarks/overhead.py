# SPDX-License-Identifier: Apache-2.0
"""
What a teacher adds to a training step, and what our Trainer adds to the plain one. Ratios come from one run, with the
variants in turns; caching the teacher is not part of a step and is timed on its own.

    python benchmarks/overhead.py --dataset FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import write_result
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillTrainer,
    SASRecConfig,
    SASRecModel,
    SequenceCollator,
    TeacherCache,
    load_interactions,
    split_leave_one_out,
)
from llmd4rec_hf.data import describe_interactions, make_demo
from llmd4rec_hf.models import build_tiny_llm


LLM_WIDTH, TEACHER_WIDTHS = 256, (64, 256, 1024)


def load(dataset: str):
    """The log's facts and its training rows."""
    interactions = make_demo()[0] if dataset == "demo" else load_interactions(dataset)
    vocabulary = ItemVocabulary.from_interactions(interactions)
    return describe_interactions(interactions), vocabulary, split_leave_one_out(interactions, vocabulary)["train"]


def make_crm(num_items: int, width: int = 64, **settings) -> SASRecModel:
    """A SASRec of random weights: what a step costs does not depend on them."""
    set_seed(0)
    return SASRecModel(SASRecConfig(num_items=num_items, hidden_size=width, **settings))


def make_llm(num_items: int) -> LLMRecommender:
    """A small LLM of random weights, trained as a whole."""
    set_seed(0)
    backbone, tokenizer = build_tiny_llm(["a user chose these items"], hidden_size=LLM_WIDTH)
    return LLMRecommender.from_backbone(backbone, num_items, 64, tokenizer=tokenizer)


def seconds_per_step(build, steps: int) -> float:
    """Wall time of a step of a freshly built trainer, without its preparation."""
    trainer = build()
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    # What the Trainer itself calls its run time begins after the teacher has been cached.
    own = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    return min(own, time.perf_counter() - start) / steps


def in_turns(builders: dict, steps: int, repeats: int) -> dict[str, float]:
    """Median seconds per step of each trainer, in turns."""
    seconds = {name: [] for name in builders}
    for _ in range(repeats):
        for name, build in builders.items():
            seconds[name].append(seconds_per_step(build, steps))
    return {name: statistics.median(values) for name, values in seconds.items()}


def builders(num_items: int, train, folder: Path, options) -> dict:
    """Each variant as a function that builds its trainer."""
    shared = {
        "output_dir": str(folder / "run"),
        "max_steps": options.steps,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": options.bf16,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
    }
    caches = {
        width: TeacherCache.build(make_crm(num_items, width, num_layers=1), train, folder / f"cache-{width}")
        for width in TEACHER_WIDTHS
    }

    def crm(teacher=None):
        return CRMTrainer(make_crm(num_items), CRMArguments(**shared), train, teacher=teacher)

    def llm(teacher=None):
        return MutualDistillTrainer(make_llm(num_items), MutualDistillArguments(**shared), train, teacher=teacher)

    def plain():
        # Batches as ours, without buckets on both sides.
        args = TrainingArguments(per_device_train_batch_size=256, learning_rate=1e-3, **shared)
        collator = SequenceCollator(max_length=50)
        return Trainer(make_crm(num_items), args, train_dataset=train, data_collator=collator)

    def ours_like_plain():
        args = CRMArguments(length_bucketing=False, loss_normalization="batch", **shared)
        return CRMTrainer(make_crm(num_items), args, train)

    variants = {"crm alone": crm}
    for width, cache in caches.items():
        variants[f"crm, teacher of width {width}"] = lambda cache=cache: crm(cache)
    variants |= {"llm alone": llm, "llm, teacher of width 64": lambda: llm(caches[64])}
    return variants | {"plain Trainer": plain, "our Trainer, same batches": ours_like_plain}


def main() -> None:
    """Measure, print ratios, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts, vocabulary, train = load(options.dataset)
    with tempfile.TemporaryDirectory() as folder:
        variants = builders(len(vocabulary), train, Path(folder), options)
        seconds = in_turns(variants, options.steps, options.repeats)
    pairs = [(name, name.split(",")[0] + " alone") for name in seconds if ", teacher" in name]
    pairs.append(("our Trainer, same batches", "plain Trainer"))
    ratios = {f"{name} / {base}": seconds[name] / seconds[base] for name, base in pairs}
    for name, ratio in ratios.items():
        print(f"{name:60s} {ratio:5.2f}")
    write_result(
        "overhead_bf16" if options.bf16 else "overhead",
        {"dataset": facts, "seconds_per_step": seconds, "ratios": ratios},
    )


if __name__ == "__main__":
    main()
