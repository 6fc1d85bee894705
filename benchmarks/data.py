# SPDX-License-Identifier: Apache-2.0
"""
From a log of millions of interactions to sequences: read, 5-core, split; ours beside plain pandas on the same file,
and what training then holds in memory. Every measurement runs in a process of its own.

    python benchmarks/data.py
    python benchmarks/data.py --interactions 1000000 --users 50000 --items 10000
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from common import in_own_process, installed_versions, write_result


CORE = 5
BATCHES, BATCH_SIZE = 2000, 256


class Laps:
    """Seconds of each step, and the process's peak memory, which imports are a part of."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.last, 2)
        self.last = now

    def result(self, **more) -> dict:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        total = round(sum(self.seconds.values()), 2)
        return {"seconds": self.seconds, "total_seconds": total, "peak_gb": round(peak / 1e9, 2), **more}


def generate(folder: Path, interactions: int, users: int, items: int, seed: int) -> dict:
    """Users and items by Zipf's law, in random order, at random seconds; as parquet and as CSV."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    random = np.random.default_rng(seed)

    def zipf(count: int, exponent: float) -> np.ndarray:
        chance = np.cumsum(np.arange(1, count + 1) ** -exponent)
        return random.permutation(count)[np.searchsorted(chance, random.random(interactions) * chance[-1])]

    columns = {
        "user_id": zipf(users, 0.8),
        "item_id": zipf(items, 1.1),
        "timestamp": random.integers(1_500_000_000, 1_600_000_000, interactions),
        "device": np.full(interactions, "a column that nobody asked for"),
    }
    table = pa.table(columns)
    pa.parquet.write_table(table, folder / "log.parquet")
    pa.csv.write_csv(table.select(["user_id", "item_id", "timestamp"]), folder / "log.csv")
    digest = hashlib.sha256()
    for name in ("user_id", "item_id", "timestamp"):
        digest.update(columns[name].data)
    return {"data_hash": digest.hexdigest()}


def ours(file: Path) -> dict:
    """The package."""
    from llmd4rec_hf.data import ItemVocabulary, k_core, load_interactions, split_leave_one_out

    lap = Laps()
    log = load_interactions(file)
    lap("read and sort")
    log = k_core(log, CORE, CORE)
    lap("5-core")
    vocabulary = ItemVocabulary.from_interactions(log)
    sequences = split_leave_one_out(log, vocabulary)
    lap("split")
    train, test = sequences["train"], sequences["test"].with_format("arrow")
    lengths = sum(batch["length"].to_numpy().sum() for batch in train.with_format("arrow").iter(1 << 16))
    targets = sum(int(batch["item_ids"].combine_chunks().flatten().to_numpy().sum()) for batch in test.iter(1 << 16))
    return lap.result(check=[len(log), len(train), int(lengths), targets])


def plain_pandas(file: Path) -> dict:
    """The same steps as one writes them in a notebook."""
    import pandas as pd

    lap = Laps()
    names = ["user_id", "item_id", "timestamp"]
    frame = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file, columns=names)
    frame = frame.sort_values(["user_id", "timestamp"], kind="stable")
    lap("read and sort")
    while True:
        users = frame.groupby("user_id")["item_id"].transform("size")
        items = frame.groupby("item_id")["user_id"].transform("size")
        keep = (users >= CORE) & (items >= CORE)
        if keep.all():
            break
        frame = frame[keep]
    lap("5-core")
    frame["item"] = frame["item_id"].astype("category").cat.codes + 1
    sequences = frame.groupby("user_id")["item"].agg(list)
    train, validation, test = sequences.map(lambda s: s[:-2]), sequences.map(lambda s: s[:-1]), sequences
    lap("split")
    lengths = int(train.map(len).sum())
    return lap.result(check=[len(frame), len(validation), lengths, int(test.map(sum).sum())])


def prepare_folder(file: Path) -> dict:
    """Everything that `examples/prepare.py` does, the data card with its floors among it."""
    from llmd4rec_hf.data import prepare

    lap = Laps()
    prepared = prepare(file, output_dir=file.parent / "prepared", k_user=CORE, k_item=CORE)
    lap("prepare")
    prepare(file, output_dir=file.parent / "prepared", k_user=CORE, k_item=CORE)
    lap("prepare again, from the cache")
    size = sum(path.stat().st_size for path in prepared.folder.rglob("*") if path.is_file())
    return lap.result(folder_gb=round(size / 1e9, 2), floors=prepared.card["floors"])


def train_from_folder(file: Path) -> dict:
    """Open the prepared folder and draw shuffled batches from it, as training does."""
    from torch.utils.data import DataLoader

    from llmd4rec_hf.data import SequenceCollator, load_prepared

    memory = {"after imports": _memory()}
    lap = Laps()
    prepared = load_prepared(file.parent / "prepared")
    items, train = len(prepared.vocabulary), prepared.sequences["train"]
    lap("open")
    memory["after opening"] = _memory()
    for number, _ in enumerate(DataLoader(train, BATCH_SIZE, shuffle=True, collate_fn=SequenceCollator()), start=1):
        if number == BATCHES:
            break
    lap(f"{number} batches of {BATCH_SIZE}")
    memory["after the batches"] = _memory()
    return lap.result(memory_gb=memory, items=items, rows=len(train))


def _memory() -> dict[str, float]:
    """Resident memory on Linux: of the process's own, and of files mapped, which the system takes back as it needs."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"VmRSS": "resident", "RssAnon": "own", "RssFile": "mapped"}
    return {ours: round(int(lines[theirs].split()[0]) * 1024 / 1e9, 3) for theirs, ours in names.items()}


STEPS: dict[str, tuple[Callable[[Path], dict], str]] = {
    "ours, parquet": (ours, "log.parquet"),
    "pandas, parquet": (plain_pandas, "log.parquet"),
    "ours, csv": (ours, "log.csv"),
    "pandas, csv": (plain_pandas, "log.csv"),
    "prepare": (prepare_folder, "log.parquet"),
    "train": (train_from_folder, "log.parquet"),
}


def main() -> None:
    """Measure every step, compare, and write `results/data.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", choices=["generate", *STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = [options.interactions, options.users, options.items, options.seed]
    if options.step == "generate":
        print(json.dumps(generate(options.folder, *size)))
        return
    if options.step:
        step, name = STEPS[options.step]
        print(json.dumps(step(options.folder / name)))
        return
    names = ("--interactions", "--users", "--items", "--seed")
    words = [word for pair in zip(names, map(str, size), strict=True) for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        found = in_own_process(__file__, *words, "--step", "generate", "--folder", folder)
        for name in STEPS:
            found[name] = in_own_process(__file__, "--step", name, "--folder", folder)
            print(f"{name}: {found[name]['total_seconds']} s, {found[name]['peak_gb']} GB", file=sys.stderr)
    for kind in ("parquet", "csv"):
        mine, theirs = found[f"ours, {kind}"], found[f"pandas, {kind}"]
        assert mine["check"] == theirs["check"], f"the results differ: {mine['check']} {theirs['check']}"
        found[f"ratio, {kind}"] = {
            "times as fast": round(theirs["total_seconds"] / mine["total_seconds"], 2),
            "share of the memory": round(mine["peak_gb"] / theirs["peak_gb"], 2),
        }
        print(f"{kind}: {found[f'ratio, {kind}']}")
    packages = {name: version(name) for name in ("numpy", "pandas", "pyarrow")}
    sizes = dict(zip(("interactions", "users", "items", "seed"), size, strict=True))
    write_result("data", {"versions": installed_versions() | packages, **sizes, **found})


if __name__ == "__main__":
    main()
