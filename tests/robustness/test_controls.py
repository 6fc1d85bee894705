# SPDX-License-Identifier: Apache-2.0
"""What a comparison stands on: controls that differ in the teaching alone, and trainings that see no target."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import NUM_ITEMS, make_run


pytestmark = pytest.mark.usefixtures("unrendered")


def trained(folder: Path) -> dict[str, bytes]:
    """The weights of every phase of a run, by its name."""
    return {path.parents[1].name: path.read_bytes() for path in folder.glob("phases/*/model/*.safetensors")}


def test_with_a_teacher_that_weighs_nothing_both_arms_are_the_same(tmp_path):
    run = make_run(tmp_path / "run", rounds=1, controls=True)
    for args in run.args.values():
        args.kl_weight, args.num_train_epochs = 0.0, 1
    run.run()
    models = trained(tmp_path / "run")
    assert len(models) == 5
    for name, weights in models.items():
        if name.endswith("-control"):
            assert weights == models[name.replace("control", "distilled")], name


def test_other_targets_change_no_training(tmp_path):
    """Caches, item vectors and both teachers included: the training histories are all that any of them is made of."""
    models, metrics = {}, {}
    for name, shift in (("as they are", 0), ("others", 5)):
        run = make_run(tmp_path / name, rounds=1, fresh_students="both", crm_teachers="both")
        # One evaluation per phase: with more of them the targets would choose among the epochs, as they should.
        run.args["llm"].num_train_epochs = run.args["crm"].num_train_epochs = 1
        run.args["crm"].init_item_vectors, run.args["crm"].dropout_with_teacher = True, 0.05
        for split, targets in (("validation", 1), ("test", 2)):
            run.sequences[split] = run.sequences[split].map(
                lambda row, n=targets, by=shift: {"item_ids": moved(row, n, by)}
            )
        metrics[name] = [entry["crm"]["validation"] for entry in run.run()["rounds"]]
        models[name] = trained(tmp_path / name)
    assert len(models["others"]) == 3
    assert models["as they are"] == models["others"]
    assert metrics["as they are"] != metrics["others"]


def moved(row: dict, targets: int, by: int) -> list[int]:
    """A row whose last items are others."""
    items = row["item_ids"]
    return items[:-targets] + [(item - 1 + by) % NUM_ITEMS + 1 for item in items[-targets:]]
