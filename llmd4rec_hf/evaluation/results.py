# SPDX-License-Identifier: Apache-2.0
"""How the results of a run are read, for its report and its picture.

`results` is what a run writes to `results.json`:

```python
{
    "dataset": {"name", "users", "items", "interactions", "density", "median_length", "tie_share", "hash", ...},
    "protocol": {"split", "seen_items", "ties", "ranking"},
    "settings": {"config.rounds": 3, "llm_args.learning_rate": 5e-4, "crm.hidden_size": 64, ...},
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
        # late_gain: by what share its best validation NDCG@10 rose in the last tenth of its training
        "crm": {"round": 0, "validation": {...}, "late_gain": 0.001, "test": {...}},
        # also "llm", "crm_without_distillation", "llm_without_distillation"
    },
    "seconds": {phase: seconds},
}
```

Whatever was not run is `None` or absent, and is shown as a dash.
"""

from __future__ import annotations


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

CONTROL_SUFFIX = "_without_distillation"
# In results["dataset"], where it was measured.
FLOOR_KEY = "test_ndcg@10_of_item_knn"
# A model that was still getting better by more than this had not been trained to the end.
_STILL_RISING = 0.01
DASH = "–"


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
    return [distillation_of(entry, student).get(quantity) for entry in results["rounds"]]


def distillation_of(entry: dict, student: str) -> dict:
    """How the distillation into a student went in a round; empty without a teacher."""
    return (entry.get("distillation") or {}).get(student) or {}


def has_distillation(results: dict) -> bool:
    """Whether any model has had a teacher in any round."""
    return any(distillation_of(entry, student) for entry in results["rounds"] for student in ("llm", "crm"))


def relative_gain(results: dict, key: str, metric: str) -> float | None:
    """`(distilled - control) / control` on test; `None` without a control or where the control has 0."""
    distilled = final_metric(results, key, metric)
    control = final_metric(results, key + CONTROL_SUFFIX, metric)
    return None if distilled is None or not control else (distilled - control) / control


def cautions(results: dict) -> list[str]:
    """What speaks against the test figures, a sentence each: models untaught, or not trained for long enough."""
    found = []
    # The floor is measured with seen items masked.
    floor = results["dataset"].get(FLOOR_KEY) if results["protocol"]["seen_items"] == "masked" else None
    for key, name in FINAL_MODELS:
        final = results["final"].get(key) or {}
        if final.get("round") == 0 and final.get("test") and not key.endswith(CONTROL_SUFFIX):
            found.append(
                f"{name}: no teacher has taught it. Its warm-up (round 0) was better on validation than any round of "
                "distillation, and is what was tested."
            )
        rise = final.get("late_gain")
        if still_rising(rise):
            found.append(
                f"{name}: still getting better when its training ended (validation NDCG@10 {percent(rise)} in the "
                "last tenth of it). With more epochs the gain may be another."
            )
        value = final_metric(results, key, "ndcg@10")
        if floor is not None and value is not None and value < floor:
            found.append(
                f"{name}: below item-kNN, a rule that learns nothing (test NDCG@10 {number(floor)}). It is "
                "under-trained, or its settings do not fit the data."
            )
    return found


def still_rising(late_gain: float | None) -> bool:
    """Whether a model was still getting better when its training ended, by what [`cautions`] calls its rise."""
    return late_gain is not None and late_gain > _STILL_RISING


def protocol_entry(split: str, seen_items: str) -> dict:
    """What the metrics were measured by: how the data were split, and the trainers' `seen_items`."""
    seen = "masked" if seen_items == "mask" else "kept"
    return {"split": split, "seen_items": seen, "ties": "pessimistic", "ranking": "full"}


def protocol_line(results: dict) -> str:
    """The protocol in one sentence, to stand beside every number."""
    split = results["protocol"]["split"].replace("_", "-")
    return f"{split} split, {ranking_line(results['protocol'], results['dataset']['items'])}"


def ranking_line(protocol: dict, num_items: int) -> str:
    """How items were ranked, in the words of every protocol."""
    full = protocol["ranking"] == "full"
    ranking = f"ranked against all {num_items:,} items" if full else f"{protocol['ranking']} ranking"
    return f"{ranking}, seen items {protocol['seen_items']}, ties {protocol['ties']}"


def number(value: float | None) -> str:
    """A metric to four places, or a dash."""
    return DASH if value is None else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A signed share in percent, or a dash."""
    return DASH if share is None else f"{100 * share:+.1f} %"


def _all_entries(results: dict) -> list[dict | None]:
    finals = [results["final"].get(key) for key, _ in FINAL_MODELS]
    return finals + [entry.get(key) for entry in results["rounds"] for key, _ in ROUND_MODELS]


def _metric(entry: dict | None, split: str, metric: str) -> float | None:
    return ((entry or {}).get(split) or {}).get(metric)
