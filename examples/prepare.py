# SPDX-License-Identifier: Apache-2.0
"""
Turn a log of interactions, in any known format, into a folder that training starts from.

    python examples/prepare.py --dataset Beauty.json.gz --items meta_Beauty.json.gz --k_core 5 --output_dir data/beauty
    python examples/prepare.py --dataset log.parquet --columns user_id=customer item_id=sku --output_dir data/shop

The folder gets interactions.parquet, items.parquet, data_card.md (also printed) and what training maps into memory.
Without further options nothing is left out of the log. Run again with the same data and options, it does nothing.
"""

from __future__ import annotations

import argparse
import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.markdown import Markdown


# Before the libraries are imported: some log at import.
logging.basicConfig(format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("llmd4rec_hf").setLevel(logging.INFO)

from llmd4rec_hf.command_line import column_pair, one_line_errors, script_parser, whole_number  # noqa: E402
from llmd4rec_hf.data import make_demo, prepare, render  # noqa: E402
from llmd4rec_hf.data.filters import DUPLICATES  # noqa: E402
from llmd4rec_hf.data.formats import format_names  # noqa: E402
from llmd4rec_hf.data.prepared import SPLITS  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = script_parser(__doc__)
    names = ", ".join(format_names())
    add = parser.add_argument_group("what to read").add_argument
    add("--dataset", required=True, metavar="SOURCE", help="a file, a folder, a Hub id, or demo")
    add("--items", metavar="SOURCE", help="the catalogue; that of the log's folder or Hub dataset by default")
    add(
        "--format",
        default="auto",
        choices=format_names(),
        metavar="NAME",
        help=f"of the log; found by default. One of {names}",
    )
    add("--items_format", default="auto", choices=format_names(), metavar="NAME", help="of the catalogue")
    add(
        "--columns",
        nargs="+",
        type=column_pair,
        metavar="OURS=THEIRS",
        help="user_id, item_id, timestamp, position, rating",
    )
    add("--item_columns", nargs="+", type=column_pair, metavar="OURS=THEIRS", help="item_id, title")
    add = parser.add_argument_group("what to leave out (nothing by default)").add_argument
    add("--min_rating", type=float, metavar="R", help="interactions rated lower")
    add("--start_time", metavar="TIME", help="interactions before it; seconds or an ISO date")
    add("--end_time", metavar="TIME", help="interactions at or after it")
    add("--duplicates", default="keep", choices=DUPLICATES, help="a user's repeats of one item; exact: at one time")
    add("--max_history", type=int, metavar="N", help="all but a user's newest N interactions")
    add("--min_history", type=whole_number, default=0, metavar="N", help="users with fewer interactions")
    add("--k_core", type=whole_number, default=0, metavar="K", help="users and items with fewer than K, repeatedly")
    add = parser.add_argument_group("what to write").add_argument
    add("--output_dir", required=True, metavar="FOLDER", help="the prepared folder")
    add("--text_template", metavar="TEXT", help='an item in words, such as "{title} ({brand}; {category})"')
    add("--max_text_length", type=int, default=512, metavar="N", help="longest text of an item (%(default)s)")
    add("--duplicate_items", default="refuse", choices=["refuse", "first"], help="an item with several titles")
    add("--split", default="leave_one_out", choices=list(SPLITS), help="%(default)s by default")
    add("--floors", action=argparse.BooleanOptionalAction, default=True, help="popularity and item kNN in the card")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """Prepare the folder and show its card."""
    source, items = (options.dataset, options.items) if options.dataset != "demo" else make_demo()
    prepared = prepare(
        source,
        items,
        options.output_dir,
        format=options.format,
        items_format=options.items_format,
        columns=dict(options.columns or []),
        item_columns=dict(options.item_columns or []),
        text_template=options.text_template,
        max_text_length=options.max_text_length,
        duplicate_items=options.duplicate_items,
        split=options.split,
        with_floors=options.floors,
        min_rating=options.min_rating,
        start_time=options.start_time,
        end_time=options.end_time,
        duplicates=options.duplicates,
        max_history=options.max_history,
        min_history=options.min_history,
        k_user=options.k_core,
        k_item=options.k_core,
    )
    console.print(Markdown(render(prepared.card)))
    folder = options.output_dir
    console.print(f"The prepared data is in {folder}: train.py --dataset {folder}", markup=False)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = build_parser().parse_args(argv)
    with one_line_errors():
        run(options, Console())


if __name__ == "__main__":
    main()
