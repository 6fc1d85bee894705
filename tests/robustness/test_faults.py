# SPDX-License-Identifier: Apache-2.0
"""Broken files, full disks, losses that are not numbers: each is named, with what to do."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_runs
import torch
from tiny_runs import in_processes, make_crm, make_run, results_of

from llmd4rec_hf import CRMArguments, CRMTrainer, TeacherCache
from llmd4rec_hf.errors import ConfigurationError, RunStateError, StorageError, TrainingError
from llmd4rec_hf.training import checkpoints, guard, loss_chunks, trainer
from llmd4rec_hf.training.checkpoints import last_whole_checkpoint


pytestmark = pytest.mark.usefixtures("unrendered")


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def world():
    return tiny_runs.world()


@pytest.fixture(scope="module")
def half_done(tmp_path_factory):
    """A run that was killed in round 1's CRM, after its second epoch; copied by each test that breaks something."""
    folder = tmp_path_factory.mktemp("half")
    outcome = in_processes(tiny_runs.run, str(folder / "run"), die=("step", "*1-crm*", 5), log=folder / "log")
    assert outcome.codes == [-9], outcome.output
    return folder / "run"


@pytest.fixture(scope="module")
def done(half_done, tmp_path_factory):
    """The same run, gone on with to its end."""
    folder = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(half_done, folder)
    make_run(folder).run()
    return folder


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def messages_of(monkeypatch, *modules) -> list[str]:
    """The warnings that modules log from now on."""
    messages: list[str] = []
    for module in modules:
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


# --- a changed byte in each kind of file -----------------------------------------------------------------------------

REFUSED = {
    "state.json": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "state.json is damaged"),
    "phases/0-crm-distilled/model/model.safetensors": (flip_a_byte, "run is then repeated from 0-crm-distilled on"),
    "phases/1-llm-distilled/model/config.json": (flip_a_byte, "config.json is missing, torn or altered"),
    "phases/1-llm-distilled/model/manifest.json": (lambda path: path.write_text("[]"), "manifest.json is damaged"),
    "phases/initial-llm/model.safetensors": (flip_a_byte, "All models of this run began with it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rebuilt_is_refused_by_name(half_done, tmp_path, name):
    damage, message = REFUSED[name]
    folder = tmp_path / "run"
    shutil.copytree(half_done, folder)
    damage(folder / name)
    with pytest.raises(RunStateError, match=message):
        make_run(folder).run()


REBUILT = {
    "teacher cache": ["_teacher_cache/hidden-00000-of-00001.npy"],
    "teacher cache's manifest": ["_teacher_cache/manifest.json"],
    "last checkpoint's weights": ["checkpoint-4/model.safetensors"],
    "last checkpoint's optimizer": ["checkpoint-4/optimizer.pt"],
    "last checkpoint's state": ["checkpoint-4/trainer_state.json"],
    "last checkpoint's manifest": ["checkpoint-4/manifest.json"],
    "every checkpoint": ["checkpoint-*/model.safetensors"],
}


@pytest.mark.parametrize("what", REBUILT)
def test_what_can_be_rebuilt_is_and_the_results_are_the_same(half_done, done, tmp_path, what):
    folder = tmp_path / "run"
    shutil.copytree(half_done, folder)
    for pattern in REBUILT[what]:
        paths = list((folder / "phases" / "1-crm-distilled").glob(pattern))
        assert paths
        for path in paths:
            flip_a_byte(path) if path.suffix != ".json" else path.write_bytes(path.read_bytes()[:-20])
    make_run(folder, seed=5).run()
    assert results_of(folder) == results_of(done)


@pytest.mark.parametrize("name", ["crm/model.safetensors", "llm/model.safetensors", "results.json"])
def test_the_end_of_a_finished_run_is_mended(done, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(before[:-7])
    make_run(folder, seed=5).run()
    assert results_of(folder) == results_of(done)
    assert (folder / name).read_bytes() == before or name == "results.json"


def test_a_phase_whose_model_is_gone_is_run_again(done, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "phases" / "2-llm-distilled" / "model")
    make_run(folder, seed=5).run()
    assert results_of(folder) == results_of(done)


def test_a_moved_run_finds_its_best_checkpoint(half_done, done, tmp_path):
    """Its name holds the folder's old place, where by now there may be nothing."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(half_done, folder)
    checkpoint = Path(last_whole_checkpoint(folder / "phases" / "1-crm-distilled"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert not state["best_model_checkpoint"].startswith(str(folder))
    make_run(folder, seed=5).run()
    assert results_of(folder) == results_of(done)


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_is_named_and_with_room_the_run_goes_on(small_disk, tmp_path, done):
    with pytest.raises(StorageError, match="Cannot write to .*Make room or give another output_dir"):
        make_run(small_disk / "run").run()
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    make_run(small_disk / "run", seed=5 if (small_disk / "run" / "state.json").exists() else 0).run()
    assert results_of(small_disk / "run") == results_of(done)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_an_error_of_the_system_is_named(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=os.strerror(code)):
        make_run(tmp_path / "run").run()


def test_a_cache_has_its_room_before_it_is_written(tmp_path, monkeypatch, world):
    """A memory map that grows into a full disk would end the process by a signal, without a word."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="No space left"):
        TeacherCache.build(make_crm(), world[0]["train"], tmp_path / "cache")


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot write to .*file"):
        make_run(tmp_path / "file").run()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting asks for root")
def test_a_read_only_file_system_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        make_run(small_disk / "run").run()


# --- training --------------------------------------------------------------------------------------------------------


def crm_trainer(world, folder, **arguments) -> CRMTrainer:
    settings = {"use_cpu": True, "disable_tqdm": True, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    return CRMTrainer(
        make_crm(), CRMArguments(str(folder), **{**settings, **arguments}), world[0]["train"], world[0]["validation"]
    )


def test_a_loss_that_is_not_finite_says_where_and_what_is_left(tmp_path, monkeypatch):
    step = trainer.DistillationTrainer.training_step

    def diverge(self, *args, **kwargs):
        if "1-llm" in self.args.output_dir and self.state.global_step == 2:
            self.model.item_head.weight.data[1] = torch.nan
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer.DistillationTrainer, "training_step", diverge)
    with pytest.raises(TrainingError) as caught:
        make_run(tmp_path / "run").run()
    assert "not finite in LLM round 1 at step 3, epoch 1.50, learning rate" in str(caught.value)
    assert "1-llm-distilled/checkpoint-2. Lower the learning rate" in str(caught.value)


def test_out_of_memory_in_the_loss_makes_smaller_chunks_and_the_same_training(tmp_path, monkeypatch, world):
    plain = crm_trainer(world, tmp_path / "plain")
    plain.train()
    loss, sizes = trainer.distillation_loss, []

    def hungry(*args, chunk_size=None, **kwargs):
        sizes.append(chunk_size)
        if chunk_size is None or chunk_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(*args, chunk_size=chunk_size, **kwargs)

    monkeypatch.setattr(trainer, "distillation_loss", hungry)
    warnings = messages_of(monkeypatch, loss_chunks)
    hungered = crm_trainer(world, tmp_path / "hungered")
    hungered.train()
    torch.testing.assert_close(hungered.model.item_matrix(), plain.model.item_matrix(), atol=1e-5, rtol=0)
    assert 0 < len(warnings) < 8
    assert "from now on it takes" in warnings[-1]
    assert max(sizes[len(warnings) :]) <= 4


@pytest.mark.parametrize(("asked", "second"), [(100_000, 32), (None, 4)])
def test_halving_begins_at_the_chunk_that_failed(asked, second):
    """Neither at what was asked for where there are fewer positions, nor at all of them where a chunk holds fewer."""
    sizes = []

    def hungry(size):
        sizes.append(size)
        if size is None or size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    loss_chunks.LossChunks(asked).run(hungry, lambda: 8, positions=64)
    assert sizes[:2] == [asked, second]


def test_out_of_memory_for_a_single_position_is_raised(tmp_path, monkeypatch, world):
    def starve(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes")

    monkeypatch.setattr(trainer, "distillation_loss", starve)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        crm_trainer(world, tmp_path).train()


def test_other_errors_of_the_loss_are_left_alone(tmp_path, monkeypatch, world):
    def fail(*args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trainer, "distillation_loss", fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        crm_trainer(world, tmp_path).train()


def test_a_torn_last_checkpoint_is_passed_over_by_name(tmp_path, monkeypatch, world):
    crm_trainer(world, tmp_path, save_strategy="epoch").train()
    first, last = (tmp_path / f"checkpoint-{step}" for step in (4, 8))
    assert last_whole_checkpoint(tmp_path) == str(last)
    flip_a_byte(last / "optimizer.pt")
    warnings = messages_of(monkeypatch, checkpoints)
    assert last_whole_checkpoint(tmp_path) == str(first)
    assert "checkpoint-8 is passed over" in warnings[0]
    assert "optimizer.pt is missing, torn or altered" in warnings[0]
    again = crm_trainer(world, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


def test_nothing_to_resume_from_is_said(tmp_path, world):
    with pytest.raises(ConfigurationError, match="There is no whole checkpoint in"):
        crm_trainer(world, tmp_path).train(resume_from_checkpoint=True)


# --- what is written holds no secret ---------------------------------------------------------------------------------


def test_no_file_of_a_run_holds_the_token(tmp_path, monkeypatch):
    """`Trainer` pickles its arguments beside every checkpoint."""
    token = "hf_thisisnotarealtoken"
    run = make_run(tmp_path / "run", rounds=1)
    for args in run.args.values():
        args.hub_token = token
    monkeypatch.setattr("llmd4rec_hf.mutual_distillation._keep_only", lambda *_: None)
    run.run()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert all(args.hub_token == token for args in run.args.values())


def test_stopping_is_not_left_over_for_the_next_run():
    with guard.stop_signals:
        guard.stop_signals.received = 15
    assert guard.stop_signals.received is None
