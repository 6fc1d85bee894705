# SPDX-License-Identifier: Apache-2.0
"""The report of a run: `report.md`, `report.png` and the table for the terminal, all from the `results` dictionary."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.table import Table

from ..files import whole_file
from .results import (
    CONTROL_SUFFIX,
    DASH,
    FINAL_MODELS,
    ROUND_MODELS,
    cautions,
    cut_offs,
    final_metric,
    has_distillation,
    main_cut_off,
    number,
    percent,
    protocol_line,
    relative_gain,
    round_distillation,
    round_metrics,
)


_METRICS = (("hr", "HR"), ("ndcg", "NDCG"), ("mrr", "MRR"))


def write_report(results: dict, output_dir: str | os.PathLike) -> None:
    """Write `report.md` and `report.png` into `output_dir`, each complete or not at all.

    Args:
        results (`dict`):
            The results of a run, see [`~llmd4rec_hf.evaluation.results`].
        output_dir (`str` or `os.PathLike`):
            Made if it does not exist.
    """
    from .figure import draw_report  # matplotlib is slow to import, and whoever only prints the table needs none of it

    figure, text = draw_report(results), markdown_report(results)
    with whole_file(Path(output_dir, "report.png")) as path:
        figure.savefig(path, format="png", dpi=150)
    with whole_file(Path(output_dir, "report.md")) as path:
        path.write_text(text, encoding="utf-8")


def summary_table(results: dict) -> Table:
    """The final test metrics at one cut-off (10 where it was measured), for the terminal."""
    k = main_cut_off(results)
    table = Table(title=f"Test, {results['dataset']['name']}", caption=protocol_line(results))
    table.add_column("Model")
    table.add_column("Round", justify="right")
    for _, name in _METRICS:
        table.add_column(f"{name}@{k}", justify="right")
    table.add_column(f"NDCG@{k} gain", justify="right")
    for key, name in FINAL_MODELS:
        gain = "" if key.endswith(CONTROL_SUFFIX) else percent(relative_gain(results, key, f"ndcg@{k}"))
        numbers = [number(final_metric(results, key, f"{metric}@{k}")) for metric, _ in _METRICS]
        table.add_row(name, _final_round(results, key), *numbers, gain, end_section=key.endswith(CONTROL_SUFFIX))
    return table


def markdown_report(results: dict) -> str:
    """The text of `report.md`: what was run, on which data, by which protocol, and what came out."""
    dataset = results["dataset"]
    sections = [
        f"# LLMD4Rec on {cell(dataset['name'])}",
        f"Mutual distillation between a conventional recommender (CRM) and a language model (LLM): "
        f"{_count(results['rounds'][-1]['round'], 'round')} after the CRM's warm-up (round 0), "
        f"seed {results['seed']}.",
        "![Validation by round and final test](report.png)",
        "## Test",
        f"Protocol: {protocol_line(results)}. For each model the round that is best on validation is tested, once.",
        _test_table(results),
        "A gain is relative to the same model trained without a teacher. All of this is one seed: before a small "
        "difference means anything, run other seeds.",
        *(f"> **Caution.** {caution}" for caution in cautions(results)),
        "## Validation by round",
        _validation_table(results),
    ]
    if has_distillation(results):
        sections += ["## Distillation by round", _distillation_table(results)]
    sections += [
        "## Data",
        markdown_table(("", ""), [(label, cell(value)) for label, value in _dataset_rows(dataset)]),
        *_settings_sections(results.get("settings") or {}),
        "## Time",
        markdown_table(("phase", "seconds"), _seconds_rows(results["seconds"])),
        "## Versions",
        markdown_table(("package", "version"), [(name, str(value)) for name, value in results["versions"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object) -> str:
    """Text that cannot break out of its table cell or heading."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _test_table(results: dict) -> str:
    columns = [(f"{metric}@{k}", f"{name}@{k}") for k in cut_offs(results) for metric, name in _METRICS]
    rows = []
    for key, name in FINAL_MODELS:
        values = [number(final_metric(results, key, metric)) for metric, _ in columns]
        rows.append((name, _final_round(results, key), *values))
        if key.endswith(CONTROL_SUFFIX):
            model = key.removesuffix(CONTROL_SUFFIX)
            gains = [percent(relative_gain(results, model, metric)) for metric, _ in columns]
            rows.append((f"*{model.upper()}, gain*", "", *gains))
    return markdown_table(("model", "round", *(header for _, header in columns)), rows)


def _validation_table(results: dict) -> str:
    k = main_cut_off(results)
    columns = {
        f"{name} {label}@{k}": round_metrics(results, key, f"{metric}@{k}")
        for key, name in ROUND_MODELS
        for metric, label in _METRICS[:2]
    }
    return _round_table(results, columns)


def _distillation_table(results: dict) -> str:
    quantities = (("kl", "KL"), ("weight_mean", "mean weight"), ("agreement", "agreement with teacher"))
    columns = {
        f"{student.upper()} {label}": round_distillation(results, student, quantity)
        for student in ("llm", "crm")
        for quantity, label in quantities
    }
    return _round_table(results, columns)


def _round_table(results: dict, columns: dict[str, list[float | None]]) -> str:
    rows = [
        (str(entry["round"]), *map(number, row))
        for entry, *row in zip(results["rounds"], *columns.values(), strict=True)
    ]
    return markdown_table(("round", *columns), rows)


def _dataset_rows(dataset: dict) -> Iterable[tuple[str, str]]:
    """The known facts in a fixed order and in readable units, then whatever else the run recorded."""
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "name": ("name", str),
        "users": ("users", "{:,}".format),
        "test_rows": ("tested histories", "{:,}".format),
        "items": ("items", "{:,}".format),
        "interactions": ("interactions", "{:,}".format),
        "density": ("density", "{:.3%}".format),
        "median_length": ("median history length", "{:g}".format),
        "max_length": ("longest history", "{:,}".format),
        "tie_share": ("interactions that share user and time with another", "{:.1%}".format),
        "repeat_share": ("interactions with an item the user had before", "{:.1%}".format),
        "hash": ("hash", str),
    }
    for key, (label, form) in formats.items():
        if key in dataset:
            yield label, DASH if dataset[key] is None else form(dataset[key])
    for key in dataset:
        if key not in formats:
            value = dataset[key]
            yield key.replace("_", " "), number(value) if isinstance(value, float) else str(value)


def _settings_sections(settings: dict) -> list[str]:
    """What decided the run; nothing for results that were put together without it."""
    rows = [(cell(name), cell(value)) for name, value in settings.items()]
    return ["## Settings", markdown_table(("setting", "value"), rows)] if rows else []


def _seconds_rows(seconds: dict[str, float]) -> list[tuple[str, str]]:
    rows = [(cell(phase), f"{value:,.1f}") for phase, value in seconds.items()]
    return [*rows, ("**all**", f"**{sum(seconds.values()):,.1f}**")]


def _final_round(results: dict, key: str) -> str:
    chosen = (results["final"].get(key) or {}).get("round")
    return DASH if chosen is None else str(chosen)


def _count(value: int, noun: str) -> str:
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"
