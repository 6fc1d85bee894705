# SPDX-License-Identifier: Apache-2.0
"""
Put several runs side by side: their tests, their gains over the controls, and what differs between them.

    python examples/compare.py runs/seed1 runs/seed2 runs/seed3
    python examples/compare.py runs/*/results.json --metric hr@20 --format markdown

Runs that differ in their seeds alone also get a mean with its standard deviation over the runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmd4rec_hf.command_line import one_line_errors, script_parser
from llmd4rec_hf.errors import DataError
from llmd4rec_hf.evaluation.report import markdown_table
from llmd4rec_hf.evaluation.results import (
    FINAL_MODELS,
    cut_offs,
    final_metric,
    number,
    percent,
    protocol_line,
    relative_gain,
)


HEADER = ("run", "data", "seed", *(name for _, name in FINAL_MODELS), "LLM gain", "CRM gain")


def build_parser() -> argparse.ArgumentParser:
    """All options."""
    parser = script_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its results.json")
    parser.add_argument("--metric", default="ndcg@10", help="of the test (%(default)s)")
    parser.add_argument(
        "--format", default="table", choices=["table", "markdown", "csv"], help="%(default)s by default"
    )
    return parser


def load_results(run: str) -> dict:
    """What a finished run has written."""
    path = Path(run, "results.json") if Path(run).is_dir() else Path(run)
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["final"], results["dataset"]["name"], protocol_line(results), results["seed"]
    except OSError as error:
        raise DataError(f"{run}: no results.json here; has the run ended?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what a run writes ({type(error).__name__}: {error}).") from error
    return results


def compare(names: list[str], runs: list[dict], metric: str) -> list[tuple[str, ...]]:
    """One line per run and, if they are comparable, one of means."""
    measured = {f"{name}@{k}" for results in runs for k in cut_offs(results) for name in ("hr", "ndcg", "mrr")}
    if metric not in measured:
        raise DataError(f"No run has measured {metric!r}; there are {', '.join(sorted(measured))}.")
    values = [[final_metric(results, key, metric) for key, _ in FINAL_MODELS] for results in runs]
    gains = [[relative_gain(results, side, metric) for side in ("llm", "crm")] for results in runs]
    lines = [
        (name, results["dataset"]["name"], str(results["seed"]), *map(number, row), *map(percent, gain))
        for name, results, row, gain in zip(names, runs, values, gains, strict=True)
    ]
    seeds = {results["seed"] for results in runs}
    if len(runs) > 1 and len(seeds) == len(runs) and len(set(map(_conditions, runs))) == 1 and not differences(runs):
        means = [_spread(column, "{:.4f}") for column in zip(*values, strict=True)]
        mean_gains = [_spread(column, "{:+.1%}") for column in zip(*gains, strict=True)]
        lines.append((f"mean of {len(runs)}", "", "", *means, *mean_gains))
    return lines


def differences(runs: list[dict]) -> dict[str, list]:
    """Settings that are not the same in all runs, with the value of each; of the data there is a line of its own."""
    settings = [results.get("settings") or {} for results in runs]
    names = {name for of_run in settings for name in of_run if not name.startswith(("sequences.", "vocabulary"))}
    found = {name: [of_run.get(name) for of_run in settings] for name in sorted(names)}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _conditions(results: dict) -> str:
    settings = results.get("settings") or {}
    data = settings.get("sequences.test", results["dataset"].get("hash")), settings.get("sequences.train")
    return json.dumps([data, results["protocol"]], sort_keys=True)


def _spread(values: tuple, form: str) -> str:
    if None in values:
        return "–"
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values)).lstrip('+')}"


def show(lines: list[tuple[str, ...]], options: argparse.Namespace, captions: list[str], console: Console) -> None:
    """In the form asked for; only a table for people says more than the table."""
    if options.format == "markdown":
        print(markdown_table(HEADER, lines))
    elif options.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([HEADER, *lines])
    else:
        table = Table(title=f"Test, {options.metric}", caption="\n".join(captions))
        for name in HEADER:
            table.add_column(name, justify="left" if name in HEADER[:2] else "right")
        for line in lines:
            table.add_row(*map(Text, line), end_section=line is lines[-2] if lines[-1][1] == "" else False)
        console.print(table)


def run(options: argparse.Namespace, console: Console) -> None:
    """Read, compare, show."""
    runs = [load_results(name) for name in options.runs]
    names = [Path(name).parent.name if name.endswith("results.json") else Path(name).name for name in options.runs]
    captions = list(dict.fromkeys(map(protocol_line, runs)))
    if len({_conditions(results) for results in runs}) > 1:
        captions.append("These runs differ in data or protocol: their numbers do not compare.")
    captions += [f"{name}: {' / '.join(map(str, values))}" for name, values in differences(runs).items()]
    show(compare(names, runs, options.metric), options, captions, console)


def main(argv: list[str] | None = None) -> None:
    """Command line: errors a user can mend are one line and exit code 1."""
    options = build_parser().parse_args(argv)
    with one_line_errors():
        run(options, Console())


if __name__ == "__main__":
    main()
