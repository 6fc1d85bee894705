# SPDX-License-Identifier: Apache-2.0
"""
Tiny trainings in processes of their own, which tests kill, stop and number as ranks.

All are forked off one process that has imported the libraries, so that a process costs milliseconds.
"""

from __future__ import annotations

import fnmatch
import gc
import json
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerState, set_seed

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    MutualDistillTrainer,
    RecommenderModel,
    SASRecConfig,
    SASRecModel,
    SequenceCollator,
    TeacherCache,
    distillation_loss,
    load_interactions,
    mutual_distillation,
    split_leave_one_out,
)
from llmd4rec_hf.distillation import stored_teacher
from llmd4rec_hf.errors import CacheError, RunInterrupted
from llmd4rec_hf.models import build_tiny_llm
from llmd4rec_hf.models.recommender import supervised
from llmd4rec_hf.training import DistillationTrainer


NUM_ITEMS = 12
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tiny_runs"])


def world(users: int = 32):
    """`(splits, vocabulary)` of users who walk round a circle of items."""
    random = np.random.default_rng(7)
    rows = []
    for user in range(users):
        item = int(random.integers(NUM_ITEMS))
        for step in range(int(random.integers(4, 10))):
            rows.append((f"u{user:02d}", f"i{item:02d}", step))
            item = (item + int(random.choice([1, 1, 1, 2]))) % NUM_ITEMS
    interactions = load_interactions(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))
    ids = sorted({row[1] for row in rows})
    vocabulary = ItemVocabulary(ids, [f"title of thing {name}" for name in ids])
    return split_leave_one_out(interactions, vocabulary), vocabulary


def make_crm(seed: int = 0, dropout: float = 0.0) -> SASRecModel:
    set_seed(seed)
    return SASRecModel(SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, num_layers=1, max_length=6, dropout=dropout))


def make_llm(vocabulary: ItemVocabulary, seed: int = 0, dropout: float = 0.0) -> LLMRecommender:
    set_seed(seed)
    backbone, tokenizer = build_tiny_llm(vocabulary.texts, hidden_size=16, num_layers=1)
    return LLMRecommender.from_backbone(
        backbone, NUM_ITEMS, 8, tokenizer=tokenizer, prompt="title of {history} thing", max_length=6, dropout=dropout
    )


def make_run(
    folder: str | Path, users: int = 32, rows_per_process: int = 16, dropout: float = 0.1, seed: int = 0, **config
) -> MutualDistillation:
    """Two rounds without controls; `seed` is that of the weights it begins with."""
    splits, vocabulary = world(users)
    shared = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": rows_per_process}
    return MutualDistillation(
        make_llm(vocabulary, seed, dropout),
        make_crm(seed, dropout),
        splits,
        vocabulary,
        MutualDistillationConfig(str(folder), **{"rounds": 2, "tolerance": -1.0, "controls": False, **config}),
        MutualDistillArguments("unused", **shared, num_train_epochs=2, learning_rate=5e-3),
        CRMArguments("unused", **shared, num_train_epochs=3, learning_rate=1e-2),
    )


def results_of(folder: str | Path) -> dict:
    """What a run has found out, without how long it took."""
    results = json.loads(Path(folder, "results.json").read_text())
    return {name: value for name, value in results.items() if name != "seconds"}


# --- processes -------------------------------------------------------------------------------------------------------


class Outcome:
    """Exit codes, negative for a signal, and what the processes printed."""

    def __init__(self, codes: list[int], output: str):
        self.codes = codes
        self.output = output


def in_processes(target: Callable, *args, log: Path, processes: int = 1, timeout: float = 100, **kwargs) -> Outcome:
    """Call `target` in each of `processes` new processes, which know each other as ranks if they are several."""
    _start_server()
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        place = {**rendezvous, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        path = Path(f"{log}.{rank}")
        process = PROCESSES.Process(target=_begin, args=(target, args, kwargs, place, str(path)))
        process.start()
        started.append((process, path))
    for process, _ in started:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [process.exitcode for process, _ in started]
    return Outcome(codes, "\n".join(path.read_text() for _, path in started))


def _start_server() -> None:
    """Python 3.11 does not tell it where to find what it is to import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _begin(target, args, kwargs, place, log) -> None:
    """What a child does: its output goes into a file, its end is an exit code."""
    # Trainers collect garbage, among all the libraries' objects if they are not set apart; the report draws curves.
    gc.freeze()
    mutual_distillation.write_report = lambda results, folder: None
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(place)
    code = 0
    try:
        target(*args, **kwargs)
    except RunInterrupted as stop:
        print(f"RunInterrupted: {stop}")
        code = 128 + stop.signal_number
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by a return: a rank that waits for others at its exit would hold up the test.
    os._exit(code)


# --- what happens in them --------------------------------------------------------------------------------------------


def run(folder: str, die: tuple[str, str, int] | None = None, **settings) -> None:
    """A run, which sends itself a signal where `die` (a name of `EVENTS`, a pattern, how often before) says."""
    if die is not None:
        event, pattern, times = die
        EVENTS[event](pattern, times)
    make_run(folder, **settings).run()


def _after(times: int, number: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Counts, and sends the signal at the count of `times`."""
    count = [0]

    def tick():
        count[0] += 1
        if count[0] == times:
            os.kill(os.getpid(), number)

    return tick


def _on_call(owner, name: str, number: signal.Signals = signal.SIGKILL, matches=lambda *args: True):
    """Makes the calls of `owner.name` that match the last of the process, or the one that is told to stop."""

    def install(pattern: str, times: int) -> None:
        tick, original = _after(times, number), getattr(owner, name)

        def call(*args, **kwargs):
            if matches(pattern, *args):
                tick()
            return original(*args, **kwargs)

        setattr(owner, name, call)

    return install


def _path_matches(index: int):
    return lambda pattern, *args: len(args) > index and fnmatch.fnmatch(str(args[index]), pattern)


def _torn_torch_save(pattern: str, times: int) -> None:
    """A file of a checkpoint is written to its half when the process dies."""
    original, tick = torch.save, _after(times)

    def save(content, path, *args, **kwargs):
        original(content, path, *args, **kwargs)
        if fnmatch.fnmatch(str(path), pattern):
            os.truncate(path, os.path.getsize(path) // 2)
            tick()

    torch.save = save


def _torn_trainer_state(pattern: str, times: int) -> None:
    original, tick = TrainerState.save_to_json, _after(times)

    def save(state, path):
        original(state, path)
        if fnmatch.fnmatch(path, pattern):
            os.truncate(path, os.path.getsize(path) // 2)
            tick()

    TrainerState.save_to_json = save


def _events() -> dict:
    def in_phase(pattern, trainer, *args):
        return fnmatch.fnmatch(trainer.args.output_dir, pattern)

    return {
        "step": _on_call(DistillationTrainer, "training_step", matches=in_phase),
        "stop at step": _on_call(DistillationTrainer, "training_step", signal.SIGTERM, matches=in_phase),
        "ctrl-c at step": _on_call(DistillationTrainer, "training_step", signal.SIGINT, matches=in_phase),
        "stop at evaluation": _on_call(DistillationTrainer, "prediction_step", signal.SIGTERM, matches=in_phase),
        "evaluation": _on_call(DistillationTrainer, "prediction_step", matches=in_phase),
        "rename": _on_call(os, "replace", matches=_path_matches(1)),
        "removal": _on_call(shutil, "rmtree", matches=_path_matches(0)),
        "cache": _on_call(stored_teacher, "_fill_shard"),
        "model": _on_call(RecommenderModel, "save_companions", matches=_path_matches(1)),
        "torn torch.save": _torn_torch_save,
        "torn trainer state": _torn_trainer_state,
    }


EVENTS = _events()


# --- for comparisons of one process with several ---------------------------------------------------------------------


def train_cases(cases: dict[str, dict], rows_per_process: int, out: str) -> None:
    """Train a model per case against a cached teacher, and put down what came out of it."""
    results = {
        name: _train_case(**case, rows_per_process=rows_per_process, out=f"{out}-{name}")
        for name, case in cases.items()
    }
    if PartialState().is_main_process:
        Path(f"{out}.json").write_text(json.dumps(results))


def _train_case(kind: str, users: int, rows_per_process: int, out: str, **arguments) -> dict:
    splits, vocabulary = world(users)
    rows_per_process //= arguments.get("gradient_accumulation_steps", 1)
    if "max_positions_per_batch" in arguments:
        # Two batches of each step, whoever takes them.
        arguments["gradient_accumulation_steps"] = 2 // int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "num_train_epochs": 3,
        "learning_rate": 5e-3,
    }
    settings |= {"per_device_train_batch_size": rows_per_process, "per_device_eval_batch_size": 8, **arguments}
    if kind == "crm":
        trainer_class, args, model, teacher = CRMTrainer, CRMArguments, make_crm(), make_llm(vocabulary, 1)
    else:
        trainer_class, args, model, teacher = (
            MutualDistillTrainer,
            MutualDistillArguments,
            make_llm(vocabulary),
            make_crm(1),
        )
    trainer = trainer_class(model, args(out, **settings), splits["train"], splits["validation"], teacher=teacher)
    trainer.train()
    metrics = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "kl" in entry]
    return {
        "losses": [entry["loss"] for entry in logs],
        "kl": [entry["kl"] for entry in logs],
        "weights": model.item_matrix().flatten().tolist(),
        "metrics": {name: value for name, value in metrics.items() if "@" in name},
        "eval_loss": metrics["eval_loss"],
        "ranks": trainer.predict(splits["test"]).predictions.tolist(),
        "steps": trainer.state.global_step,
    }


def resume_cases(cases: dict[str, dict], out: str) -> None:
    """Train from a checkpoint in the middle of the second epoch, and see whether it ends as the whole training did."""
    results = {}
    for name, settings in cases.items():
        args = {"use_cpu": True, "disable_tqdm": True, "num_train_epochs": 3, "save_steps": 1, "logging_steps": 1}
        args |= {"save_strategy": "steps", "learning_rate": 5e-3, **settings}
        train = world(27)[0]["train"]
        whole = CRMTrainer(make_crm(dropout=0.3), CRMArguments(f"{out}-{name}", **args), train)
        whole.train()
        steps = whole.state.max_steps
        cut = CRMTrainer(make_crm(dropout=0.3), CRMArguments(f"{out}-{name}-cut", **args), train)
        cut.train(resume_from_checkpoint=f"{out}-{name}/checkpoint-{steps // 3 + 1}")
        losses = [[entry.get("loss") for entry in trainer.state.log_history] for trainer in (whole, cut)]
        equal = torch.equal(whole.model.item_matrix(), cut.model.item_matrix())
        results[name] = {"steps": steps, "equal": equal and losses[0][:-1] == losses[1][:-1]}
    if PartialState().is_main_process:
        Path(f"{out}.json").write_text(json.dumps(results))


def stop_on_rank(folder: str, rank: int, **settings) -> None:
    """A run, one process of which is told to stop."""
    mine = os.environ["RANK"] == str(rank)
    run(folder, die=("stop at step", "*1-llm*", 1) if mine else None, **settings)


def fail_on_rank(folder: str, rank: int) -> None:
    """A teacher cache, one process of which cannot write."""
    write_shards = stored_teacher._write_shards

    def fail(*args):
        if PartialState().process_index == rank:
            raise CacheError(f"the disk of rank {rank} is full")
        return write_shards(*args)

    stored_teacher._write_shards = fail
    PartialState(cpu=True)
    TeacherCache.build(make_crm(), world()[0]["train"], Path(folder, "cache"))


def diverge_on_rank(folder: str, rank: int) -> None:
    """A run in which one process's loss is not a number at its third step."""
    step, count = DistillationTrainer.training_step, [0]

    def diverge(trainer, *args, **kwargs):
        loss = step(trainer, *args, **kwargs)
        count[0] += 1
        if count[0] == 3 and PartialState().process_index == rank:
            trainer.guard.watch(loss * torch.nan)
        return loss

    DistillationTrainer.training_step = diverge
    run(folder, rows_per_process=4)


def train_in_shards(out: str, kind: str, reshard: bool) -> None:
    """Five steps of a model that torch's FSDP2 cuts over the processes, with the loss outside of its forward."""
    state = PartialState(cpu=True)
    splits, vocabulary = world(16)
    model = make_crm() if kind == "crm" else make_llm(vocabulary)
    if state.num_processes > 1:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (state.num_processes,))
        torch.distributed.fsdp.fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        assert any(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batch = SequenceCollator(max_length=6)(list(splits["train"]))
    count = (batch["labels"] != -100).sum()
    mine = {name: value.chunk(state.num_processes)[state.process_index] for name, value in batch.items()}
    losses = []
    for _ in range(5):
        outputs = model(mine["item_ids"], mine["attention_mask"])
        hidden, item_matrix, labels = supervised(outputs.hidden, mine["labels"], outputs.item_matrix)
        loss = distillation_loss(hidden, item_matrix, labels, num_items_in_batch=count).loss
        # FSDP averages gradients over processes, as DDP does.
        (loss * state.num_processes).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(reduce(loss.detach(), "sum")))
    if state.is_main_process:
        Path(out).write_text(json.dumps(losses))
