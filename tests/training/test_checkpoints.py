# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from transformers import TrainerState

from llmd4rec_hf.files import MANIFEST_NAME, find_damage, write_manifest
from llmd4rec_hf.training.checkpoints import STATE_NAME, last_whole_checkpoint, rehome, rotate_checkpoints


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, 5, [5, 10, 20, 100]),
        (0, 5, [5, 10, 20, 100]),
        (4, None, [5, 10, 20, 100]),
        (2, None, [20, 100]),
        (1, None, [100]),
        (1, 100, [100]),
        # The last one is for going on, the best one for the end: both stay, however low the limit.
        (1, 5, [5, 100]),
        (2, 5, [5, 100]),
        (3, 10, [10, 20, 100]),
        # A best one that is elsewhere protects none of these.
        (2, 7, [20, 100]),
    ],
)
def test_rotation(tmp_path, limit, best, left):
    for step in (5, 100, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("w")
    others = [tmp_path / "checkpoint-7x", tmp_path / "model"]
    for path in others:
        path.mkdir()
    rotate_checkpoints(tmp_path, limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(path.name for path in others), *(f"checkpoint-{step}" for step in left)]
    )


def test_nothing_to_rotate(tmp_path):
    rotate_checkpoints(tmp_path / "not-there", 1, None)


def test_a_checkpoint_finds_its_best_one_beside_it_and_else_where_it_was(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / name).mkdir()
    checkpoint = tmp_path / "checkpoint-2"
    for name, expected in (("checkpoint-1", str(tmp_path / "checkpoint-1")), ("checkpoint-9", "/old/checkpoint-9")):
        TrainerState(best_model_checkpoint=f"/old/{name}").save_to_json(str(checkpoint / STATE_NAME))
        write_manifest(checkpoint)
        rehome(checkpoint)
        assert find_damage(checkpoint) is None
        assert TrainerState.load_from_json(str(checkpoint / STATE_NAME)).best_model_checkpoint == expected
        # Once it is at home nothing is written any more.
        written = (checkpoint / MANIFEST_NAME).stat().st_mtime_ns
        rehome(checkpoint)
        assert (checkpoint / MANIFEST_NAME).stat().st_mtime_ns == written


@pytest.mark.parametrize(("damaged", "last"), [(None, 30), (30, 20), (10, 20), (20, 30)], ids=lambda value: str(value))
def test_the_last_checkpoint_is_whole_if_the_best_one_that_it_points_to_is(tmp_path, damaged, last):
    """The last of three has the first as its best one, wherever that lay once; the second is its own."""
    for step, best in ((10, 10), (20, 20), (30, 10)):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        TrainerState(best_model_checkpoint=f"/old/checkpoint-{best}").save_to_json(str(checkpoint / STATE_NAME))
        (checkpoint / "weights").write_text("w")
        write_manifest(checkpoint)
    if damaged is not None:
        (tmp_path / f"checkpoint-{damaged}" / "weights").write_text("v")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{last}")
