# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that can be verified: which to resume from, and which to delete."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from ..errors import ConfigurationError
from ..files import MANIFEST_NAME, find_damage, write_manifest


logger = logging.get_logger(__name__)

STATE_NAME = "trainer_state.json"


def last_whole_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The last checkpoint in `folder` that can be gone on from: every byte of it is as it was written, and so is the
    best one that it points to. `Trainer`'s own choice is the last by name, which a process that died in the middle of
    writing leaves torn.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        problem = find_damage(checkpoint) or _damage_of_best(checkpoint)
        if problem is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint.name} is passed over: {problem}.")
    return None


def checkpoint_to_resume(asked: str | os.PathLike | bool | None, folder: str | os.PathLike) -> str | None:
    """
    The checkpoint that a training goes on from, ready for it; `None` for one that begins anew.

    Args:
        asked (`str`, `os.PathLike` or `bool`, *optional*): what `Trainer.train` takes as `resume_from_checkpoint`:
            `True` is the last one that is whole.
        folder (`str` or `os.PathLike`): where the training's own are.

    Raises:
        ConfigurationError: no such checkpoint, or a torn one. One of another `Trainer` cannot be told to be torn.
    """
    if not asked:
        return None
    checkpoint = last_whole_checkpoint(folder) if asked is True else _checked(asked)
    if checkpoint is None:
        raise ConfigurationError(
            f"There is no whole checkpoint in {folder} to resume from. One that another Trainer has written does not "
            "say whether it is whole: give its path."
        )
    rehome(checkpoint)
    return checkpoint


def _checked(checkpoint: str | os.PathLike) -> str:
    if not Path(checkpoint).is_dir():
        raise ConfigurationError(f"There is no checkpoint {checkpoint} to resume from.")
    if Path(checkpoint, MANIFEST_NAME).is_file() and (damage := find_damage(Path(checkpoint))):
        raise ConfigurationError(
            f"{damage}. resume_from_checkpoint=True takes the last checkpoint that is whole; to go on from this "
            f"one as it is, delete its {MANIFEST_NAME}."
        )
    return str(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def rotate_checkpoints(folder: str | os.PathLike, limit: int | None, best: str | os.PathLike | None) -> None:
    """
    Delete the oldest checkpoints in `folder`, never the last one or the best.

    Args:
        folder (`str` or `os.PathLike`): where they are.
        limit (`int`, *optional*): how many stay; all with `None` or 0.
        best (`str` or `os.PathLike`, *optional*): the best one.
    """
    checkpoints = _checkpoints(Path(folder))
    if not limit or not checkpoints:
        return
    kept = {checkpoints[-1].name} if best is None else {checkpoints[-1].name, Path(best).name}
    others = [checkpoint for checkpoint in checkpoints if checkpoint.name not in kept]
    for checkpoint in others[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _damage_of_best(checkpoint: Path) -> str | None:
    best = json.loads((checkpoint / STATE_NAME).read_text())["best_model_checkpoint"]
    if best is None or Path(best).name == checkpoint.name:
        return None
    return find_damage(checkpoint.with_name(Path(best).name))


def rehome(checkpoint: str | os.PathLike) -> None:
    """Let a checkpoint find the best one beside it, although the folder they are in has been moved."""
    path = Path(checkpoint, STATE_NAME)
    state = TrainerState.load_from_json(str(path))
    best = state.best_model_checkpoint
    here = None if best is None else Path(checkpoint).with_name(Path(best).name)
    # A checkpoint that was copied alone has its best one where it was.
    if here is None or best == str(here) or not here.is_dir():
        return
    state.best_model_checkpoint = str(here)
    state.save_to_json(str(path))
    write_manifest(path.parent)
