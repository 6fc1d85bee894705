# SPDX-License-Identifier: Apache-2.0
"""The data card: what a log is like, and what that means for numbers measured on it."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow import column_array, to_table
from .floors import DECAY, NEIGHBOURS, WINDOW, floors, row_items
from .interactions import describe_interactions, log_table, sort_log
from .vocabulary import ItemVocabulary


SPLIT_PER_USER_LEAKS = (
    "Every user's history is split at a moment of its own, so models learn from interactions that happened after the "
    "targets they are tested on; numbers are comparable with those of the same split, not with live use."
)


def data_card(
    interactions: datasets.Dataset,
    sequences: datasets.DatasetDict,
    vocabulary: ItemVocabulary,
    *,
    with_floors: bool = True,
) -> dict[str, Any]:
    """
    Counts a log, its catalogue and its splits, and measures what no model may fall below.

    Args:
        interactions (`datasets.Dataset`):
            What [`load_interactions`] returns.
        sequences (`datasets.DatasetDict`):
            Its `train`, `validation` and `test`, as the `split_*` functions return them.
        vocabulary ([`ItemVocabulary`]):
            The one the splits were made with.
        with_floors (`bool`, *optional*, defaults to `True`):
            Also measure the popularity and item-kNN floors, the only part that takes more than a moment.

    Returns:
        `dict`: ready for JSON.

        - `log`: what [`describe_interactions`] returns, and `has_clock`;
        - `catalogue`: `items`, `items_without_text` (called by their id) and `items_sharing_text` (another item has
          the same text, so text alone cannot tell them apart); both `None` without texts;
        - `splits`: `rows` and `interactions` of each;
        - `test`: `targets`, `cold_targets` (not in any training row), `cold_targets_after_validation` (in no
          validation row either), `repeated_targets` (in their own history: out of reach where seen items are masked);
        - `leakage`: `training_after_target`, the share of training interactions that happened later than a test
          target, on average over the targets (`None` without a clock), and a `statement`;
        - `floors`: what [`~llmd4rec_hf.data.floors.floors`] returns, and the `setting`.
    """
    log = describe_interactions(interactions)
    log["has_clock"] = "position" not in interactions.column_names
    card = {
        "log": log,
        "catalogue": _catalogue(vocabulary),
        "splits": {name: _size(rows) for name, rows in sequences.items()},
        "test": _targets(sequences, vocabulary.num_items),
        "leakage": _leakage(interactions, sequences),
    }
    if with_floors:
        card["floors"] = floors(sequences["train"], sequences["test"], vocabulary.num_items) | {
            "setting": f"fitted on train alone, whole catalogue ranked, seen items masked, ties against the rule; "
            f"kNN: {NEIGHBOURS} neighbours, {WINDOW} steps, decay {DECAY}, cosine, then popularity"
        }
    return card


def render(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    log, catalogue, test, leakage = (card[part] for part in ("log", "catalogue", "test", "leakage"))
    rows = [
        ("users, items, interactions", f"{log['users']:,}, {log['items']:,}, {log['interactions']:,}"),
        ("density", f"{log['density']:.4%}"),
        ("interactions per user", f"median {log['median_length']:g}, longest {log['max_length']:,}"),
        ("order", "by time" if log["has_clock"] else "by position: there is no clock"),
        ("ties: interactions that share user and time", f"{log['tie_share']:.1%}"),
        ("repeats: interactions with an item met before", f"{log['repeat_share']:.2%}"),
        ("items without a text", _count(catalogue["items_without_text"], catalogue["items"])),
        ("items whose text another item shares", _count(catalogue["items_sharing_text"], catalogue["items"])),
        *((f"rows in {name}", f"{part['rows']:,}") for name, part in card["splits"].items()),
        ("test targets that train has never seen", _count(test["cold_targets"], test["targets"])),
        ("... nor validation", _count(test["cold_targets_after_validation"], test["targets"])),
        ("test targets in their own history", _count(test["repeated_targets"], test["targets"])),
    ]
    if leakage["training_after_target"] is not None:
        rows.append(("training interactions later than a test target", f"{leakage['training_after_target']:.1%}"))
    lines = ["# Data card", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    if "floors" in card:
        lines += _render_floors(card["floors"])
    return "\n".join([*lines, leakage["statement"], "", f"Content hash: `{log['hash']}`", ""])


def _render_floors(found: dict[str, Any]) -> list[str]:
    names = {"popularity": "most popular items", "item_knn": "item kNN"}
    rows = [f"| {names[key]} | {found[key]['hr@10']:.4f} | {found[key]['ndcg@10']:.4f} |" for key in names]
    sizes = f"{found['fitted_interactions']:,} interactions fitted, {found['ranked_targets']:,} targets ranked"
    head = ["| floor, on test | HR@10 | NDCG@10 |", "|---|---|---|"]
    return [*head, *rows, "", f"Floors: {found['setting']} ({sizes}). A model below them is under-trained.", ""]


def _count(count: int | None, of: int) -> str:
    return "no texts" if count is None else f"{count:,} ({count / of:.2%})"


def _catalogue(vocabulary: ItemVocabulary) -> dict[str, int | None]:
    if vocabulary.texts is None:
        return {"items": len(vocabulary), "items_without_text": None, "items_sharing_text": None}
    texts, ids = pa.array(vocabulary.texts, pa.string()), pa.array(vocabulary.item_ids).cast(pa.string())
    nameless = pc.equal(texts, ids)
    counts = pc.value_counts(texts.filter(pc.invert(nameless))).field("counts")
    shared = pc.sum(counts.filter(pc.greater(counts, 1))).as_py() or 0
    return {
        "items": len(vocabulary),
        "items_without_text": pc.sum(nameless).as_py() or 0,
        "items_sharing_text": shared,
    }


def _size(rows: datasets.Dataset) -> dict[str, int]:
    return {"rows": len(rows), "interactions": int(column_array(rows, "length").sum())}


def _targets(sequences: datasets.DatasetDict, num_items: int) -> dict[str, int]:
    known = np.zeros(num_items + 1, bool)
    known[row_items(sequences["train"])[0]] = True
    items, lengths = row_items(sequences["test"])
    last = np.cumsum(lengths) - 1
    row = np.repeat(np.arange(len(lengths)), lengths)
    repeated = items == items[last][row]
    repeated[last] = False
    cold = ~known[items[last]]
    known[row_items(sequences["validation"])[0]] = True
    return {
        "targets": len(last),
        "cold_targets": int(cold.sum()),
        "cold_targets_after_validation": int((~known[items[last]]).sum()),
        "repeated_targets": len(np.unique(row[repeated])),
    }


def _leakage(interactions: datasets.Dataset, sequences: datasets.DatasetDict) -> dict[str, Any]:
    if "position" in interactions.column_names:
        return {"training_after_target": None, "statement": SPLIT_PER_USER_LEAKS}
    table, user, users = sort_log(log_table(interactions))
    time = table["timestamp"].to_numpy()
    starts = np.searchsorted(user, np.arange(len(users)))
    # A row is always a user's first items, so its length says where in the log it ends.
    lengths = {name: _lengths(sequences[name], users) for name in ("train", "test")}
    train = np.sort(time[np.arange(len(time)) - starts[user] < lengths["train"][user]])
    tested = lengths["test"] > 0
    targets = time[(starts + lengths["test"] - 1)[tested]]
    if not len(train):
        return {"training_after_target": None, "statement": "There is nothing to train on."}
    later = float((1 - np.searchsorted(train, targets, side="right") / len(train)).mean())
    statement = SPLIT_PER_USER_LEAKS if later else "No training interaction is later than a test target."
    return {"training_after_target": later, "statement": statement}


def _lengths(rows: datasets.Dataset, users: pa.Array) -> np.ndarray:
    """The length of each user's row in this split, 0 where there is none."""
    table = to_table(rows.select_columns(["user_id", "length"]))
    lengths = np.zeros(len(users), np.int64)
    lengths[pc.index_in(table["user_id"], value_set=users).to_numpy()] = table["length"].to_numpy()
    return lengths
