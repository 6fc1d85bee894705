# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: validation by round, final test against the controls, and how the distillation went."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .results import (
    CONTROL_SUFFIX,
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


# Two colours that stay apart for colour-blind readers (Okabe and Ito). A control has its model's: dashed, or pale.
_COLOURS = {"llm": "#D55E00", "crm": "#0072B2"}
_PALE = {"llm": "#F1C6A6", "crm": "#A6CDE3"}
_CONTROL_LINE = {"ls": (0, (4, 2)), "lw": 1.5, "alpha": 0.6, "ms": 4}
_INK, _FAINT = "#2b2b2b", "#767676"

_STYLE = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


def draw_report(results: dict) -> Figure:
    """Draw the figure of `report.png`; it belongs to no window and to no pyplot state.

    Args:
        results (`dict`):
            The results of a run, see [`~llmd4rec_hf.evaluation.results`].
    """
    metric = f"ndcg@{main_cut_off(results)}"
    layout, widths = [["rounds", "test"]], [1.5, 1.15]
    if has_distillation(results):
        layout, widths = [["rounds", "test", "weight"], ["rounds", "test", "agreement"]], [1.5, 1.15, 0.85]
    with rc_context(_STYLE):
        figure = Figure(figsize=(4 * sum(widths), 4.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
        panels = figure.subplot_mosaic(layout, width_ratios=widths)
        _draw_rounds(panels["rounds"], results, metric)
        _draw_test(panels["test"], results, metric)
        if has_distillation(results):
            _draw_distillation(panels["weight"], results, "weight_mean", "Mean distillation weight")
            _draw_distillation(panels["agreement"], results, "agreement", "Agreement with teacher")
            panels["agreement"].set_xlabel("round")
        title = figure.suptitle(
            f"LLMD4Rec on {results['dataset']['name']}", x=0.012, ha="left", size=14, weight="bold"
        )
        title.set_parse_math(False)  # two dollars in a name are no formula
        figure.supxlabel(
            f"{protocol_line(results)}, seed {results['seed']}", x=0.012, ha="left", size=8.5, color=_FAINT
        )
    return figure


def _draw_rounds(axes: Axes, results: dict, metric: str) -> None:
    rounds = [entry["round"] for entry in results["rounds"]]
    for model, colour in _COLOURS.items():
        distilled = round_metrics(results, model, metric)
        control = round_metrics(results, f"{model}_control", metric)
        _draw_line(axes, rounds, distilled, color=colour, label=f"{model.upper()}, distilled")
        _draw_line(axes, rounds, control, color=colour, label=f"{model.upper()}, without", **_CONTROL_LINE)
        chosen = (results["final"].get(model) or {}).get("round")
        if chosen in rounds and distilled[rounds.index(chosen)] is not None:
            axes.plot(chosen, distilled[rounds.index(chosen)], "o", ms=12, mfc="none", mec=colour, mew=1.2)
    axes.set_title(f"Validation {metric.upper()} by round")
    axes.set_xlabel("round (a ring marks the one that is tested)")
    axes.margins(x=0.08, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, handlelength=2.6)


def _draw_test(axes: Axes, results: dict, metric: str) -> None:
    width = 0.36
    for position, (model, colour) in enumerate(_COLOURS.items()):
        control = final_metric(results, model + CONTROL_SUFFIX, metric)
        distilled = final_metric(results, model, metric)
        for offset, value, shade in ((-width / 2, control, _PALE[model]), (width / 2, distilled, colour)):
            bar = axes.bar(position + offset, value or 0, width * 0.94, color=shade)
            axes.bar_label(bar, ["not run" if value is None else number(value)], padding=3, size=9)
        gain = relative_gain(results, model, metric)
        note = "" if gain is None else f"\n{percent(gain)}"
        axes.annotate(
            f"{model.upper()}{note}", (position, 0), (0, -24), textcoords="offset points", ha="center", va="top"
        )
    axes.set_title(f"Test {metric.upper()}")
    bars = [position + offset for position in range(len(_COLOURS)) for offset in (-width / 2, width / 2)]
    axes.set_xticks(bars, ["without", "distilled"] * len(_COLOURS), size=8, color=_FAINT)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    axes.set_ylim(bottom=0)


def _draw_distillation(axes: Axes, results: dict, quantity: str, title: str) -> None:
    rounds = [entry["round"] for entry in results["rounds"]]
    for model, colour in _COLOURS.items():
        _draw_line(axes, rounds, round_distillation(results, model, quantity), color=colour)
    axes.set_title(title, size=10)
    axes.margins(x=0.1, y=0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _draw_line(axes: Axes, rounds: list[int], values: list[float | None], **style) -> None:
    """A line through the rounds that have a value; nothing at all, not even in the legend, if none has."""
    points = [(x, y) for x, y in zip(rounds, values, strict=True) if y is not None]
    if points:
        axes.plot(*zip(*points, strict=True), **{"lw": 2.0, "marker": "o", "ms": 5, **style})
