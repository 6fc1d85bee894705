# SPDX-License-Identifier: Apache-2.0
"""The report of a run: `report.md`, `report.png` and the table for the terminal, all from the `results` dictionary.

`results` is what a run writes to `results.json`:

```python
{
    "dataset": {"name", "users", "items", "interactions", "density", "median_length", "tie_share", "hash", ...},
    "protocol": {"split", "seen_items", "ties", "ranking"},
    "seed": 0,
    "versions": {package: version},
    "rounds": [
        {
            "round": 0,
            "crm": {"validation": {"hr@10": ..., ...}, "test": None},  # also "llm", "crm_control", "llm_control"
            "distillation": {"crm": {"kl", "weight_mean", "agreement"}, "llm": {...}},
        },
    ],
    "final": {
        "crm": {"round": 0, "validation": {...}, "test": {...}},
        # also "llm", "crm_without_distillation", "llm_without_distillation"
    },
    "seconds": {phase: seconds},
}
```

Whatever was not run is `None` or absent, and is shown as a dash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.table import Table


# Keys of results["final"]: each model followed by its control, and how both are called.
FINAL_MODELS = (
    ("llm", "LLM, distilled"),
    ("llm_without_distillation", "LLM, without distillation"),
    ("crm", "CRM, distilled"),
    ("crm_without_distillation", "CRM, without distillation"),
)

# Keys of a round, in the order of the columns.
ROUND_MODELS = (
    ("llm", "LLM"),
    ("llm_control", "LLM, control"),
    ("crm", "CRM"),
    ("crm_control", "CRM, control"),
)

_METRICS = (("hr", "HR"), ("ndcg", "NDCG"), ("mrr", "MRR"))
_DASH = "–"
_CONTROL_SUFFIX = "_without_distillation"


def write_report(results: dict, output_dir: str | os.PathLike) -> None:
    """Write `report.md` and `report.png` into `output_dir`, each complete or not at all.

    Args:
        results (`dict`):
            The results of a run, see the top of this module.
        output_dir (`str` or `os.PathLike`):
            Made if it does not exist.
    """
    from .figure import draw_report  # matplotlib is slow to import, and whoever only prints the table needs none of it

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    figure = draw_report(results)
    _write_then_replace(output_dir / "report.png", lambda path: figure.savefig(path, format="png", dpi=150))
    text = markdown_report(results)
    _write_then_replace(output_dir / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


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
        gain = "" if key.endswith(_CONTROL_SUFFIX) else percent(relative_gain(results, key, f"ndcg@{k}"))
        numbers = [number(final_metric(results, key, f"{metric}@{k}")) for metric, _ in _METRICS]
        table.add_row(name, _final_round(results, key), *numbers, gain, end_section=key.endswith(_CONTROL_SUFFIX))
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
        "## Validation by round",
        _validation_table(results),
    ]
    if any(_distillation(entry, student) for entry in results["rounds"] for student in ("llm", "crm")):
        sections += ["## Distillation by round", _distillation_table(results)]
    sections += [
        "## Data",
        markdown_table(("", ""), [(label, cell(value)) for label, value in _dataset_rows(dataset)]),
        "## Time",
        markdown_table(("phase", "seconds"), _seconds_rows(results["seconds"])),
        "## Versions",
        markdown_table(("package", "version"), [(name, str(value)) for name, value in results["versions"].items()]),
    ]
    return "\n\n".join(sections) + "\n"


def cut_offs(results: dict) -> list[int]:
    """Every k for which any model was measured, ascending."""
    measured = [(entry or {}).get(split) for entry in _all_entries(results) for split in ("test", "validation")]
    return sorted({int(name[3:]) for metrics in measured for name in metrics or () if name.startswith("hr@")})


def main_cut_off(results: dict) -> int:
    """The one k to show where there is room for one: 10, or the middle one if 10 was not measured."""
    ks = cut_offs(results)
    return 10 if 10 in ks or not ks else ks[len(ks) // 2]


def final_metric(results: dict, key: str, metric: str) -> float | None:
    """A test metric of a model of `results["final"]`, or `None` if that model or its test was not run."""
    return _metric(results["final"].get(key), "test", metric)


def round_metrics(results: dict, key: str, metric: str) -> list[float | None]:
    """A validation metric of a model, one value per round."""
    return [_metric(entry.get(key), "validation", metric) for entry in results["rounds"]]


def round_distillation(results: dict, student: str, quantity: str) -> list[float | None]:
    """A quantity of the distillation into a student (`"crm"` or `"llm"`), one value per round."""
    return [_distillation(entry, student).get(quantity) for entry in results["rounds"]]


def relative_gain(results: dict, key: str, metric: str) -> float | None:
    """`(distilled - control) / control` on test; `None` without a control or where the control has 0."""
    distilled = final_metric(results, key, metric)
    control = final_metric(results, key + _CONTROL_SUFFIX, metric)
    return None if distilled is None or not control else (distilled - control) / control


def protocol_line(results: dict) -> str:
    """The protocol in one sentence, to stand beside every number."""
    protocol, items = results["protocol"], results["dataset"]["items"]
    ranking = (
        f"ranked against all {items:,} items" if protocol["ranking"] == "full" else f"{protocol['ranking']} ranking"
    )
    split = protocol["split"].replace("_", "-")
    return f"{split} split, {ranking}, seen items {protocol['seen_items']}, ties {protocol['ties']}"


def number(value: float | None) -> str:
    """A metric to four places, or a dash."""
    return _DASH if value is None else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A signed share in percent, or a dash."""
    return _DASH if share is None else f"{100 * share:+.1f} %"


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
        if key.endswith(_CONTROL_SUFFIX):
            model = key.removesuffix(_CONTROL_SUFFIX)
            gains = [percent(relative_gain(results, model, metric)) for metric, _ in columns]
            rows.append((f"*{model.upper()}, gain*", "", *gains))
    return markdown_table(("model", "round", *(header for _, header in columns)), rows)


def _validation_table(results: dict) -> str:
    k = main_cut_off(results)
    columns = [
        (key, f"{metric}@{k}", f"{name} {label}@{k}") for key, name in ROUND_MODELS for metric, label in _METRICS[:2]
    ]
    values = [[number(value) for value in round_metrics(results, key, metric)] for key, metric, _ in columns]
    rows = [(str(entry["round"]), *row) for entry, *row in zip(results["rounds"], *values, strict=True)]
    return markdown_table(("round", *(header for *_, header in columns)), rows)


def _distillation_table(results: dict) -> str:
    quantities = (("kl", "KL"), ("weight_mean", "mean weight"), ("agreement", "agreement with teacher"))
    columns = [
        (student, quantity, f"{student.upper()} {label}")
        for student in ("llm", "crm")
        for quantity, label in quantities
    ]
    values = [[number(value) for value in round_distillation(results, *column[:2])] for column in columns]
    rows = [(str(entry["round"]), *row) for entry, *row in zip(results["rounds"], *values, strict=True)]
    return markdown_table(("round", *(header for *_, header in columns)), rows)


def _dataset_rows(dataset: dict) -> Iterable[tuple[str, str]]:
    """The known facts in a fixed order and in readable units, then whatever else the run recorded."""
    formats: dict[str, tuple[str, Callable[[float], str]]] = {
        "name": ("name", str),
        "users": ("users", "{:,}".format),
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
            yield label, _DASH if dataset[key] is None else form(dataset[key])
    for key in dataset:
        if key not in formats:
            yield key.replace("_", " "), str(dataset[key])


def _seconds_rows(seconds: dict[str, float]) -> list[tuple[str, str]]:
    rows = [(cell(phase), f"{value:,.1f}") for phase, value in seconds.items()]
    return [*rows, ("**all**", f"**{sum(seconds.values()):,.1f}**")]


def _all_entries(results: dict) -> list[dict | None]:
    finals = [results["final"].get(key) for key, _ in FINAL_MODELS]
    return finals + [entry.get(key) for entry in results["rounds"] for key, _ in ROUND_MODELS]


def _metric(entry: dict | None, split: str, metric: str) -> float | None:
    return ((entry or {}).get(split) or {}).get(metric)


def _distillation(entry: dict, student: str) -> dict:
    return (entry.get("distillation") or {}).get(student) or {}


def _final_round(results: dict, key: str) -> str:
    chosen = (results["final"].get(key) or {}).get("round")
    return _DASH if chosen is None else str(chosen)


def _count(value: int, noun: str) -> str:
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"


def _write_then_replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: a reader or a crash never meets half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
