# SPDX-License-Identifier: Apache-2.0
"""Many short phases in one process leave nothing behind."""

from __future__ import annotations

import shutil
import threading

import psutil
import tiny_runs

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillArguments, MutualDistillTrainer


PHASES = 200


def test_two_hundred_phases_without_growth(tmp_path):
    splits, vocabulary = tiny_runs.world(8)
    models = {"crm": tiny_runs.make_crm(), "llm": tiny_runs.make_llm(vocabulary)}
    settings = {"use_cpu": True, "disable_tqdm": True, "max_steps": 1, "per_device_train_batch_size": 8}
    kinds = {"crm": (CRMTrainer, CRMArguments), "llm": (MutualDistillTrainer, MutualDistillArguments)}
    process, seen = psutil.Process(), []
    for phase in range(PHASES):
        student, teacher = ("crm", "llm") if phase % 2 else ("llm", "crm")
        trainer_class, arguments = kinds[student]
        folder = tmp_path / str(phase)
        args = arguments(str(folder), save_strategy="epoch", **settings)
        trainer = trainer_class(models[student], args, splits["train"], splits["validation"], teacher=models[teacher])
        trainer.train()
        trainer.evaluate()
        shutil.rmtree(folder)
        if phase % 20 == 19:
            seen.append((process.memory_info().rss / 2**20, process.num_fds(), threading.active_count()))
    memory, files, threads = zip(*seen, strict=True)
    # The first phases fill allocators and caches.
    assert memory[-1] - memory[1] < 20, memory
    assert files[-1] <= files[1], files
    assert threads[-1] <= threads[1], threads
