# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import os

import pytest
from rich.console import Console

from llmd4rec_hf.evaluation.figure import draw_report
from llmd4rec_hf.evaluation.report import markdown_report, relative_gain, summary_table, write_report
from llmd4rec_hf.evaluation.results import cautions, cut_offs, main_cut_off


def metrics(scale):
    """Metrics at 5, 10 and 20 of a believable shape."""
    names = ("hr", "ndcg", "mrr")
    return {
        f"{n}@{k}": round(scale * f * k**0.4, 4) for k in (5, 10, 20) for n, f in zip(names, (2, 1, 0.8), strict=True)
    }


def results(rounds=4):
    """A finished run: both models gain by distillation on validation, the CRM loses a little on test.

    Round 0 is the warm-up of the CRM: no LLM and no distillation yet.
    """
    entries = [
        {
            "round": r,
            "crm": {"validation": metrics(0.0200 + 0.002 * r - 0.0006 * r**2), "test": None},
            "llm": {"validation": metrics(0.0230 + 0.0018 * r - 0.0005 * r**2), "test": None},
            "crm_control": {"validation": metrics(0.0200 - 0.0002 * r), "test": None},
            "llm_control": {"validation": metrics(0.0218 + 0.0001 * r), "test": None},
            "distillation": {
                "crm": {"kl": 0.9 - 0.1 * r, "weight_mean": 1.1 + 0.05 * r, "agreement": 0.31 + 0.06 * r},
                "llm": {"kl": 1.2 - 0.1 * r, "weight_mean": 0.9 + 0.03 * r, "agreement": 0.28 + 0.05 * r},
            },
        }
        for r in range(rounds)
    ]
    entries[0].update(llm=None, llm_control=None, distillation={"crm": None, "llm": None})
    return {
        "dataset": {
            "name": "demo",
            "users": 1200,
            "items": 800,
            "interactions": 9100,
            "density": 9100 / (1200 * 800),
            "median_length": 7.0,
            "max_length": 31,
            "tie_share": 0.0,
            "repeat_share": 0.125,
            "hash": "0123456789abcdef",
        },
        "protocol": {"split": "leave_one_out", "seen_items": "masked", "ties": "pessimistic", "ranking": "full"},
        "seed": 0,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "rounds": entries,
        "final": {
            "crm": {
                "round": min(2, rounds - 1),
                "validation": metrics(0.0216),
                "test": {**metrics(0.0195), "ndcg@10": 0.0390},
            },
            "llm": {
                "round": min(2, rounds - 1),
                "validation": metrics(0.0246),
                "test": {**metrics(0.0225), "ndcg@10": 0.0550},
            },
            "crm_without_distillation": {
                "round": 0,
                "validation": metrics(0.0200),
                "test": {**metrics(0.0190), "ndcg@10": 0.0400},
            },
            "llm_without_distillation": {
                "round": 0,
                "validation": metrics(0.0219),
                "test": {**metrics(0.0210), "ndcg@10": 0.0500},
            },
        },
        "seconds": {"crm warm-up": 12.5, "round 0 llm": 1040.04},
    }


def without_controls():
    """A run whose controls and distillation were switched off, stopped in the first round before the test."""
    run = copy.deepcopy(results(rounds=1))
    run["final"].update(crm_without_distillation=None, llm_without_distillation=None)
    for model in ("crm", "llm"):
        run["final"][model]["test"] = None
        del run["rounds"][0][f"{model}_control"]
    run["rounds"][0]["distillation"] = None
    run["dataset"]["tie_share"] = None
    return run


def render(table, width):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def row(text, start):
    """The cells of the one markdown row whose first cell is `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


class TestMarkdownReport:
    def test_test_table(self):
        text = markdown_report(results())
        header = row(text, "model")
        assert header[2:] == [f"{name}@{k}" for k in (5, 10, 20) for name in ("HR", "NDCG", "MRR")]
        column = header.index("NDCG@10")
        assert row(text, "LLM, distilled")[column] == "0.0550"
        assert row(text, "LLM, without distillation")[column] == "0.0500"
        assert row(text, "CRM, distilled")[:2] == ["CRM, distilled", "2"]
        assert row(text, "CRM, without distillation")[:2] == ["CRM, without distillation", "0"]

    def test_gains_are_signed(self):
        text = markdown_report(results())
        column = row(text, "model").index("NDCG@10")
        assert row(text, "*LLM, gain*")[column] == "+10.0 %"
        assert row(text, "*CRM, gain*")[column] == "-2.5 %"

    def test_protocol_data_and_versions(self):
        text = markdown_report(results())
        assert "leave-one-out split, ranked against all 800 items, seen items masked, ties pessimistic" in text
        assert "3 rounds after the CRM's warm-up (round 0), seed 0" in text
        assert row(text, "interactions") == ["interactions", "9,100"]
        assert row(text, "density") == ["density", "0.948%"]
        assert row(text, "interactions with an item the user had before")[1] == "12.5%"
        assert row(text, "**all**")[1] == "**1,052.5**"
        assert row(text, "torch") == ["torch", "2.13.0"]

    def test_what_else_is_known_of_the_data(self):
        run = results()
        run["dataset"] |= {"test_rows": 1100, "test_ndcg@10_of_item_knn": 0.06014647811254318}
        text = markdown_report(run)
        assert row(text, "tested histories")[1] == "1,100"
        assert row(text, "test ndcg@10 of item knn")[1] == "0.0601"

    def test_validation_has_a_row_per_round(self):
        text = markdown_report(results())
        table = text[text.index("## Validation by round") : text.index("## Distillation")]
        expected = results()["rounds"][1]["crm_control"]["validation"]["ndcg@10"]
        assert row(table, "round")[-1] == "CRM, control NDCG@10"
        assert row(table, "1")[-1] == f"{expected:.4f}"
        assert row(table, "0")[1:5] == ["–"] * 4
        assert row(table, "3")[0] == "3"

    def test_distillation_has_a_row_per_round(self):
        text = markdown_report(results())
        table = text[text.index("## Distillation by round") : text.index("## Data")]
        assert row(table, "round")[1:4] == ["LLM KL", "LLM mean weight", "LLM agreement with teacher"]
        assert row(table, "0")[1:] == ["–"] * 6
        assert row(table, "2")[1:] == ["1.0000", "0.9600", "0.3800", "0.7000", "1.2000", "0.4300"]

    def test_what_was_not_run_is_a_dash(self):
        text = markdown_report(without_controls())
        assert row(text, "LLM, without distillation") == ["LLM, without distillation", *["–"] * 10]
        assert row(text, "*CRM, gain*")[2:] == ["–"] * 9
        assert row(text, "0")[1:3] == ["–", "–"]
        assert "0 rounds after" in text
        assert "## Distillation" not in text
        assert "None" not in text

    def test_other_cut_offs(self):
        run = without_controls()
        for entry in (run["final"]["crm"], run["final"]["llm"], run["rounds"][0]["crm"]):
            entry["validation"] = {"hr@1": 0.1, "ndcg@1": 0.1, "mrr@1": 0.1, "loss": 2.0}
        assert row(markdown_report(run), "model")[2:] == ["HR@1", "NDCG@1", "MRR@1"]
        assert "CRM NDCG@1" in markdown_report(run)

    def test_a_name_cannot_break_the_table(self):
        run = results()
        run["dataset"]["name"] = "a|b\nc"
        assert markdown_report(run).startswith("# LLMD4Rec on a\\|b c\n")


class TestCautions:
    def test_none_for_models_that_were_trained_to_the_end(self):
        run = results()
        for entry in run["final"].values():
            entry["late_gain"] = 0.01
        run["dataset"]["test_ndcg@10_of_item_knn"] = 0.0390
        assert cautions(run) == []
        assert "Caution" not in markdown_report(run)

    def test_a_model_that_was_still_getting_better(self):
        run = results()
        run["final"]["llm_without_distillation"]["late_gain"] = 0.035
        (caution,) = cautions(run)
        assert caution.startswith("LLM, without distillation: still getting better")
        assert "+3.5 %" in caution
        assert f"> **Caution.** {caution}" in markdown_report(run)

    def test_a_model_below_the_floor(self):
        run = results()
        run["dataset"]["test_ndcg@10_of_item_knn"] = 0.0395
        (caution,) = cautions(run)
        assert caution.startswith("CRM, distilled: below item-kNN")
        assert "0.0395" in caution

    def test_the_floor_is_for_masked_items(self):
        run = results()
        run["dataset"]["test_ndcg@10_of_item_knn"] = 0.5
        run["protocol"]["seen_items"] = "kept"
        assert cautions(run) == []

    def test_a_model_that_no_teacher_has_taught(self):
        run = results()
        run["final"]["crm"]["round"] = 0
        (caution,) = cautions(run)
        assert caution.startswith("CRM, distilled: no teacher has taught it. Its warm-up (round 0)")

    def test_what_was_not_run_is_not_blamed(self):
        run = without_controls()
        run["dataset"]["test_ndcg@10_of_item_knn"] = 0.5
        assert cautions(run) == []


class TestCutOffs:
    @pytest.mark.parametrize(
        ("tested", "validated", "expected", "shown"),
        [
            ((5, 10, 20), (10,), [5, 10, 20], 10),
            ((3,), (1, 20), [1, 3, 20], 3),
            ((), (1, 5), [1, 5], 5),
            ((), (), [], 10),
        ],
    )
    def test_all_that_were_measured_and_the_one_to_show(self, tested, validated, expected, shown):
        run = without_controls()
        run["final"]["llm"] = {"test": {f"hr@{k}": 0.1 for k in tested}}
        run["final"]["crm"] = None
        run["rounds"] = [{"round": 0, "crm": {"validation": {f"hr@{k}": 0.1 for k in validated}}}]
        assert (cut_offs(run), main_cut_off(run)) == (expected, shown)


class TestRelativeGain:
    def test_without_or_against_nothing(self):
        run = results()
        assert relative_gain(run, "llm", "ndcg@10") == pytest.approx(0.1)
        run["final"]["llm_without_distillation"]["test"]["ndcg@10"] = 0.0
        assert relative_gain(run, "llm", "ndcg@10") is None
        run["final"]["llm_without_distillation"] = None
        assert relative_gain(run, "llm", "ndcg@10") is None


class TestSummaryTable:
    def test_fits_a_terminal_of_80_columns(self):
        text = render(summary_table(results()), width=80)
        assert "│ LLM, distilled            │     2 │" in text
        assert "+10.0 %" in text
        assert "-2.5 %" in text
        assert "…" not in text

    def test_what_was_not_run_is_a_dash(self):
        text = render(summary_table(without_controls()), width=80)
        assert "None" not in text
        assert "–" in text


class TestDrawReport:
    def test_lines_and_bars(self):
        rounds, test, weight, agreement = draw_report(results()).axes
        labels = {line.get_label(): line for line in rounds.lines}
        expected = [entry["llm"]["validation"]["ndcg@10"] for entry in results()["rounds"][1:]]
        assert list(labels["LLM, distilled"].get_xdata()) == [1, 2, 3]
        assert list(labels["LLM, distilled"].get_ydata()) == expected
        assert {"LLM, without", "CRM, distilled", "CRM, without"} <= set(labels)
        assert [bar.get_height() for bar in test.patches] == [0.05, 0.055, 0.04, 0.039]
        assert len(weight.lines) == len(agreement.lines) == 2

    def test_what_was_not_run_is_left_out(self):
        rounds, test = draw_report(without_controls()).axes
        assert [text.get_text() for text in rounds.get_legend().get_texts()] == ["CRM, distilled"]
        assert [text.get_text() for text in test.texts if text.get_text() == "not run"] == ["not run"] * 4


class TestWriteReport:
    @pytest.mark.parametrize("run", [results(), results(rounds=1), without_controls()], ids=["full", "short", "nulls"])
    def test_files(self, run, tmp_path):
        before = copy.deepcopy(run)
        write_report(run, tmp_path / "new" / "folder")
        assert run == before
        assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["report.md", "report.png"]
        assert (tmp_path / "new" / "folder" / "report.md").read_text(encoding="utf-8") == markdown_report(run)
        assert (tmp_path / "new" / "folder" / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_a_name_with_dollars_is_no_formula(self, tmp_path):
        run = results()
        run["dataset"]["name"] = "from $5_ to {$9"
        write_report(run, tmp_path)
        assert (tmp_path / "report.png").is_file()

    def test_a_failure_leaves_the_old_report_whole(self, tmp_path, monkeypatch):
        write_report(results(), tmp_path)
        old = (tmp_path / "report.md").read_text(encoding="utf-8")

        def fail(*args):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_report(results(rounds=1), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.md", "report.png"]
        assert (tmp_path / "report.md").read_text(encoding="utf-8") == old
