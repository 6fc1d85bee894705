# SPDX-License-Identifier: Apache-2.0
"""
Recommend items for histories of anybody, known to the training or not.

    python examples/recommend.py --model runs/demo/crm --history B00001 B00017 --history B00400
    python examples/recommend.py --model runs/demo/llm --dataset new_users.csv --k 20 --output recommendations.csv
    python examples/recommend.py --model runs/demo/crm --similar_to B00001

Ids are your own, as in the log. A history goes from the oldest item to the newest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmd4rec_hf import RecommenderModel, load_interactions
from llmd4rec_hf.command_line import column_pair, one_line_errors, output_file, script_parser
from llmd4rec_hf.data.formats import format_names
from llmd4rec_hf.data.formats.base import text_lines
from llmd4rec_hf.errors import DataError, UnknownItemsError
from llmd4rec_hf.models import Recommendations


SHOWN = 20
WRITERS = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda frame, path: frame.to_parquet(path, index=False),
}


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = script_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="SOURCE", help="a folder or Hub id, of a CRM or an LLM")
    add = parser.add_argument_group("for what (one of them)").add_mutually_exclusive_group(required=True).add_argument
    add("--history", nargs="+", action="append", metavar="ITEM", help="items in order; again for another history")
    add("--dataset", metavar="SOURCE", help="a log: one history per user; a file, a folder or a Hub id")
    add("--similar_to", nargs="+", metavar="ITEM", help="items to find others like")
    add = parser.add_argument_group("how").add_argument
    add("--k", type=int, default=10, help="how many (%(default)s)")
    add("--keep_seen", action="store_true", help="items of the history may be recommended again")
    add("--candidates", metavar="FILE", help="choose from these items alone; one id per line")
    add("--skip_unknown", action="store_true", help="leave out items the model does not know, instead of stopping")
    add("--format", default="auto", choices=format_names(), metavar="NAME", help="of the log; found by default")
    add("--columns", nargs="+", type=column_pair, metavar="OURS=THEIRS", help="user_id, item_id, timestamp")
    endings = ", ".join(WRITERS)
    add("--output", type=output_file, metavar="FILE", help=f"write them all here; by its ending one of {endings}")
    return parser


def load_histories(options: argparse.Namespace) -> tuple[list, list[list]]:
    """Names and histories, from the command line or from a log."""
    if options.history:
        return [" ".join(history) for history in options.history], options.history
    log = load_interactions(options.dataset, format=options.format, columns=dict(options.columns or []))
    histories = log.to_pandas().groupby("user_id", sort=False)["item_id"].agg(list)
    return histories.index.tolist(), histories.tolist()


def load_candidates(path: str | None) -> list[str] | None:
    """The ids in a file, one per line."""
    if path is None:
        return None
    try:
        ids = [line.strip() for line in text_lines(Path(path).read_text(encoding="utf-8-sig"))]
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read the candidates in {path}, a text in UTF-8: {error}.") from error
    if not ids:
        raise DataError(f"--candidates {path} holds no ids: write one per line, or leave it out to choose from all.")
    return ids


def find(options: argparse.Namespace, model: RecommenderModel) -> tuple[list, Recommendations]:
    """What was asked for, and the answers."""
    choice = {
        "candidates": load_candidates(options.candidates),
        "on_unknown": "ignore" if options.skip_unknown else "raise",
    }
    if options.similar_to:
        return options.similar_to, model.similar_items(options.similar_to, options.k, **choice)
    names, histories = load_histories(options)
    return names, model.recommend(histories, options.k, filter_seen=not options.keep_seen, **choice)


def show(names: list, found: Recommendations, model: RecommenderModel, console: Console) -> None:
    """The first lists, with titles where there are any."""
    vocabulary = model.vocabulary
    for name, ids, scores in list(zip(names, found.ids, found.scores, strict=True))[:SHOWN]:
        table = Table("", "item", "title", title=Text(str(name), "table.title"), title_justify="left")
        table.add_column("score", justify="right")
        titles = [vocabulary.text(internal) for internal in vocabulary.encode(ids)] if vocabulary.texts else ids
        for rank, (item, title, score) in enumerate(zip(ids, titles, scores, strict=True), start=1):
            table.add_row(str(rank), Text(str(item)), Text(str(title)), f"{score:.3f}")
        if not ids:
            table.add_row("", "nothing is left to recommend", "", "")
        console.print(table)
    if len(names) > SHOWN:
        console.print(f"... and {len(names) - SHOWN:,} more: --output FILE writes all of them.")


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, recommend, write or show."""
    writer = None
    if options.output:
        writer = WRITERS.get(Path(options.output).suffix)
        if writer is None:
            raise DataError(f"{options.output}: its ending must be one of {', '.join(WRITERS)}.")
    model = RecommenderModel.from_pretrained(options.model)
    try:
        names, found = find(options, model)
    except UnknownItemsError as error:
        raise error.with_remedy("--skip_unknown leaves them out.") from None
    if writer is None:
        show(names, found, model, console)
        return
    writer(found.to_pandas(names).rename(columns={} if options.dataset else {"user_id": "query"}), options.output)
    console.print(f"Recommendations for {len(names):,} queries are in {options.output}")


def main(argv: list[str] | None = None) -> None:
    """Command line: errors a user can mend are one line and exit code 1."""
    options = build_parser().parse_args(argv)
    with one_line_errors():
        run(options, Console())


if __name__ == "__main__":
    main()
