# SPDX-License-Identifier: Apache-2.0
"""
Measure any saved model on any split of any log.

    python examples/evaluate.py --model runs/demo/crm
    python examples/evaluate.py --model USER/NAME-llm --dataset data/beauty --split validation --seen_items keep
    python examples/evaluate.py --model runs/demo/crm --save_run crm.run --save_qrels demo.qrels

The last item of every row is ranked against all items. A run and qrels are what trec_eval, ranx and others read.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmd4rec_hf import RecommenderModel, load_interactions, ranking_metrics
from llmd4rec_hf.command_line import (
    column_pair,
    cut_off_list,
    one_line_errors,
    output_file,
    positive_number,
    script_parser,
)
from llmd4rec_hf.data import data_hash, load_prepared, make_demo
from llmd4rec_hf.data.formats import format_names
from llmd4rec_hf.data.prepared import SPLITS, is_prepared
from llmd4rec_hf.errors import DataError, UnknownItemsError
from llmd4rec_hf.evaluation.results import protocol_entry, ranking_line
from llmd4rec_hf.models.recommendations import Recommendations, save_qrels, trec_word


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = script_parser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model", required=True, metavar="SOURCE", help="a folder or Hub id, of a CRM or an LLM")
    add(
        "--dataset",
        default="demo",
        metavar="SOURCE",
        help="demo, a file, a folder, a Hub id, or what prepare.py wrote",
    )
    add("--format", default="auto", choices=format_names(), metavar="NAME", help="of the log; found by default")
    add("--columns", nargs="+", type=column_pair, metavar="OURS=THEIRS", help="user_id, item_id, timestamp, ...")
    add("--split_by", choices=list(SPLITS), help="that of a prepared folder or of the model's run, else leave_one_out")
    add("--split", default="test", choices=["train", "validation", "test"], help="%(default)s by default")
    add = parser.add_argument_group("how").add_argument
    add("--seen_items", default="mask", choices=["mask", "keep"], help="leave items of the history out of the ranking")
    add("--new_items", default="refuse", choices=["refuse", "skip"], help="interactions with items the model lacks")
    add("--ks", type=cut_off_list, default="5,10,20", metavar="K,K,...", help="cut-offs (%(default)s)")
    add("--batch_size", type=positive_number, default=256, metavar="N", help="histories at a time (%(default)s)")
    add("--use_cpu", action="store_true", help="even if there is an accelerator")
    add = parser.add_argument_group("what to write").add_argument
    add("--save_metrics", type=output_file, metavar="FILE", help="metrics and protocol, as JSON")
    add("--save_run", type=output_file, metavar="FILE", help="the best items of every row, as a TREC run")
    add("--save_qrels", type=output_file, metavar="FILE", help="the true items, as TREC qrels")
    add("--run_depth", type=positive_number, default=100, metavar="K", help="items per row of the run (%(default)s)")
    return parser


def load_log(options: argparse.Namespace):
    """The log, and how it was split for training if that is known: another test would hold its targets."""
    source = options.dataset
    if source == "demo":
        return load_interactions(make_demo(seed=0)[0]), "leave_one_out"
    if is_prepared(source):
        prepared = load_prepared(source)
        return prepared.interactions, prepared.card["prepared"]["split"]
    return load_interactions(source, format=options.format, columns=dict(options.columns or [])), None


def facts_of_run(model: str) -> dict:
    """How the run that a model lies in split its data, and the hashes of its splits; nothing where there is none."""
    try:
        results = json.loads(Path(model, "..", "results.json").read_text(encoding="utf-8"))
        return {"split": results["protocol"]["split"], **results["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def caution_of(options: argparse.Namespace, run_facts: dict, rows) -> str | None:
    """What to say of rows that are not the run's, as with other filters: its numbers are not to be compared with."""
    if run_facts.get(f"sequences.{options.split}") in (None, data_hash(rows)):
        return None
    return f"not the {options.split} rows of the model's run: prepare the data as for training"


def make_rows(options: argparse.Namespace, model: RecommenderModel, interactions, split_by: str):
    """The rows of the split, in the model's own internal ids."""
    if options.new_items == "skip":
        known = {str(item) for item in model.vocabulary.item_ids}
        interactions = interactions.filter(lambda item: str(item) in known, input_columns="item_id")
    try:
        rows = SPLITS[split_by](interactions, model.vocabulary)[options.split]
    except UnknownItemsError as error:
        remedy = f"they are in --dataset {options.dataset}, and --new_items skip leaves out interactions with them."
        raise error.with_remedy(remedy) from None
    if len(rows) == 0:
        raise DataError(f"No user has enough interactions for {options.split}.")
    return rows


def measure(options: argparse.Namespace, model: RecommenderModel, rows, ks: tuple[int, ...]) -> dict[str, float]:
    """Metrics by full ranking."""
    from llmd4rec_hf import CRMArguments, CRMTrainer  # slow to import, and --help needs neither

    with tempfile.TemporaryDirectory() as folder:
        args = CRMArguments(
            folder,
            per_device_eval_batch_size=options.batch_size,
            seen_items=options.seen_items,
            use_cpu=options.use_cpu,
            disable_tqdm=len(rows) < 10_000,
            report_to="none",
        )
        ranks = CRMTrainer(model, args).predict(rows).predictions
    return ranking_metrics(ranks, ks)


def check_ids(options: argparse.Namespace, model: RecommenderModel, rows) -> None:
    """Ids that the files asked for cannot hold are refused before all is measured."""
    names = [rows["user_id"]] if options.save_run or options.save_qrels else []
    if options.save_qrels:
        names.append(model.vocabulary.decode([items[-1] for items in rows["item_ids"]]))
    if options.save_run:  # any item may be among the best
        names.append(model.vocabulary.item_ids)
    for name in chain(*names):
        trec_word(name)


def save_lists(options: argparse.Namespace, model: RecommenderModel, rows) -> None:
    """The run and the qrels."""
    decode, users = model.vocabulary.decode, rows["user_id"]
    if options.save_qrels:
        save_qrels(options.save_qrels, users, [decode(row[-1:])[0] for row in rows["item_ids"]])
    if options.save_run:
        best_lists(options, model, [decode(row) for row in rows["item_ids"]]).save_trec(options.save_run, users)


def best_lists(options: argparse.Namespace, model: RecommenderModel, sequences: list[list]) -> Recommendations:
    """The best items of every row, by the protocol of the ranks: there a true item stays although it was seen."""
    depth, histories = options.run_depth, [sequence[:-1] for sequence in sequences]
    found = model.recommend(histories, depth, filter_seen=options.seen_items == "mask")
    repeats = [row for row, (*history, target) in enumerate(sequences) if target in history]
    if options.seen_items == "keep" or not repeats:
        return found
    deeper = depth + max(len(histories[row]) for row in repeats)
    unmasked = model.recommend([histories[row] for row in repeats], deeper, filter_seen=False)
    for row, ids, scores in zip(repeats, unmasked.ids, unmasked.scores, strict=True):
        seen = set(histories[row]) - {sequences[row][-1]}
        kept = [place for place, item in enumerate(ids) if item not in seen][:depth]
        found.ids[row], found.scores[row] = [ids[place] for place in kept], [scores[place] for place in kept]
    return found


def show(metrics: dict[str, float], title: str, caption: str, console: Console) -> None:
    """A table with a row per cut-off."""
    table = Table("k", "HR", "NDCG", "MRR", title=title, caption=caption)
    for k in dict.fromkeys(name.split("@")[1] for name in metrics):
        table.add_row(k, *(f"{metrics[f'{name}@{k}']:.4f}" for name in ("hr", "ndcg", "mrr")))
    console.print(table)


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, measure, show, write."""
    model = RecommenderModel.from_pretrained(options.model)
    if model.vocabulary is None:
        raise DataError(f"{options.model} has no vocabulary.json, so its internal ids mean nothing.")
    interactions, prepared_by = load_log(options)
    run_facts = facts_of_run(options.model)
    split_by = options.split_by or prepared_by or run_facts.get("split")
    split_by = split_by if split_by in SPLITS else "leave_one_out"  # none is known, or it cannot be repeated
    rows = make_rows(options, model, interactions, split_by)
    check_ids(options, model, rows)
    metrics = measure(options, model, rows, options.ks)
    protocol = protocol_entry(split_by, options.seen_items) | {"rows": options.split, "number_of_rows": len(rows)}
    caption = f"{len(rows):,} rows, {split_by} split, {ranking_line(protocol, len(model.vocabulary))}"
    if caution := caution_of(options, run_facts, rows):
        protocol["caution"] = caution
        caption += f"; {caution}"
    show(metrics, f"{Path(options.model).name}, {options.split}", caption, console)
    if options.save_metrics:
        content = {"model": options.model, "dataset": options.dataset, "protocol": protocol, "metrics": metrics}
        Path(options.save_metrics).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_lists(options, model, rows)


def main(argv: list[str] | None = None) -> None:
    """Command line: errors a user can mend are one line and exit code 1."""
    options = build_parser().parse_args(argv)
    with one_line_errors():
        run(options, Console())


if __name__ == "__main__":
    main()
