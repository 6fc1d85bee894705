# SPDX-License-Identifier: Apache-2.0
"""Malformed input, over the whole public surface: one clear error each, and never another traceback."""

from __future__ import annotations

import pickle
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pandas as pd
import pytest
import tiny_runs
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmd4rec_hf import (
    CRMArguments,
    CRMTrainer,
    GRU4RecConfig,
    GRU4RecModel,
    ItemVocabulary,
    LLMRecommender,
    MutualDistillArguments,
    MutualDistillation,
    MutualDistillationConfig,
    MutualDistillTrainer,
    SASRecConfig,
    SASRecModel,
    SequenceCollator,
    TeacherCache,
    distillation_loss,
    load_interactions,
    rank_weights,
    ranking_metrics,
    split_by_time,
    split_leave_one_out,
    target_ranks,
)
from llmd4rec_hf.data import k_core, load_items
from llmd4rec_hf.errors import CacheError, LLMD4RecError


HEADER = "user_id,item_id,timestamp\n"
LOG = HEADER + "".join(f"u,i{n},{n}\n" for n in range(5))


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """What the cases start from: data and models that are as they should be."""
    splits, vocabulary = tiny_runs.world(16)
    folder = tmp_path_factory.mktemp("known")
    crm, llm = tiny_runs.make_crm(), tiny_runs.make_llm(vocabulary)
    crm.vocabulary = vocabulary
    cache = TeacherCache.build(crm, splits["train"], folder / "cache")
    other = ItemVocabulary([f"i{n:02d}" for n in reversed(range(12))])
    return SimpleNamespace(
        splits=splits, vocabulary=vocabulary, crm=crm, llm=llm, cache=cache, other=other, folder=folder
    )


def text(content: str | bytes, name: str = "log.csv", load=load_interactions, **options):
    """A case that loads a file with this content."""

    def case(known, folder):
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load(path, **options)

    return case


def frame(load=load_interactions, **columns):
    return lambda known, folder: load(pd.DataFrame(columns))


def loss(**changes):
    """A case of the loss with some of its arguments replaced."""

    def case(known, folder):
        given = {"hidden": torch.ones(3, 2), "item_matrix": torch.ones(5, 2), "labels": torch.tensor([1, 2, 4])}
        distillation_loss(**{**given, **changes})

    return case


def ranks(**changes):
    def case(known, folder):
        given = {"hidden": torch.ones(3, 2), "item_matrix": torch.ones(5, 2), "labels": torch.tensor([1, 2, 4])}
        target_ranks(**{**given, **changes})

    return case


def crm_args(folder, **arguments):
    return CRMArguments(str(folder), use_cpu=True, disable_tqdm=True, **arguments)


def llm_args(folder, **arguments):
    return MutualDistillArguments(str(folder), use_cpu=True, disable_tqdm=True, **arguments)


def a_run(known, folder, llm=None, crm=None, sequences=None, vocabulary=None, config=None, **arguments):
    return MutualDistillation(
        llm or known.llm,
        crm or known.crm,
        sequences or known.splits,
        vocabulary or known.vocabulary,
        MutualDistillationConfig(str(folder / "run"), **(config or {})),
        llm_args(folder, **arguments.get("llm_args", {})),
        crm_args(folder, **arguments.get("crm_args", {})),
    )


def with_vocabulary(model, vocabulary):
    model.vocabulary = vocabulary
    return model


def rows(*item_ids):
    return datasets.Dataset.from_list(
        [{"item_ids": list(ids), "length": len(ids), "row_id": n} for n, ids in enumerate(item_ids)]
    )


def sequences_with(item: int):
    split = rows([1, 2, item], [3, 4, 5])
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), split))


# Name of the case: (what is done with what is known and an empty folder, a part of the message).
CASES = {
    # logs
    "log: no such file": (lambda known, folder: load_interactions(folder / "none.csv"), "none.csv"),
    "log: empty": (text(""), "empty"),
    "log: a header alone": (text(HEADER), "holds no interactions"),
    "log: a pickle": (text(pickle.dumps([1, 2])), "this is a pickle"),
    "log: a pickle named parquet": (text(pickle.dumps([1, 2]), "log.parquet"), "pickle"),
    "log: no item column": (text("user_id,colour\n1,red\n"), "item"),
    "log: a missing user": (text(HEADER + "u,i,1\n,i,2\n"), "user_id"),
    "log: a missing item": (text(HEADER + "u,i,1\nu,,2\n"), "item_id"),
    "log: a negative time": (text(HEADER + "u,i,-5\n"), "-5"),
    "log: a time that is not one": (text(HEADER + "u,i,1\nu,j,soon\n"), "soon"),
    "log: NaN as a time": (
        frame(user_id=["u"], item_id=["i"], timestamp=[float("nan")]),
        "timestamp",
    ),
    "log: infinite time": (frame(user_id=["u"], item_id=["i"], timestamp=[float("inf")]), "timestamp"),
    "log: truncated parquet": (text(b"PAR1\x00\x01", "log.parquet"), "log.parquet"),
    "log: a JSON list": (text("[1, 2", "log.json"), "log.json"),
    "log: an unknown format": (text(LOG, format="mystery"), "mystery"),
    "log: a column that is not there": (text(LOG, columns={"user_id": "who"}), "who"),
    "log: one of our columns that is none": (text(LOG, columns={"userid": "user_id"}), "no column for user_id"),
    "log: a number": (lambda known, folder: load_interactions(7), "int"),
    "log: an empty folder": (lambda known, folder: load_interactions(folder), "the folder is empty"),
    # catalogues
    "items: twice with other titles": (text("item_id,title\n1,a\n1,b\n", load=load_items), "occurs more than once"),
    "items: a missing id": (text("item_id,title\n1,a\n,b\n", load=load_items), "item_id"),
    "items: no id": (text("name,colour\na,red\n", load=load_items), "item_id"),
    "items: a log": (text(LOG, load=load_items), "log and no catalogue"),
    "items: an unknown field in a template": (
        text("item_id,title\n1,a\n", load=load_items, text_template="{nope}"),
        "nope",
    ),
    "items: a broken template": (
        text("item_id,title\n1,a\n", load=load_items, text_template="{title"),
        "text_template",
    ),
    "items: an unknown way with duplicates": (
        text("item_id,title\n1,a\n", load=load_items, duplicates="last"),
        "duplicates='last'",
    ),
    # vocabularies
    "vocabulary: empty": (lambda known, folder: ItemVocabulary([]), "at least one item"),
    "vocabulary: a doubled id": (lambda known, folder: ItemVocabulary(["a", "a"]), "occurs more than once"),
    "vocabulary: a missing id": (lambda known, folder: ItemVocabulary(["a", None]), "row 2 has no id"),
    "vocabulary: too few texts": (lambda known, folder: ItemVocabulary(["a", "b"], ["x"]), "1 texts for 2 items"),
    "vocabulary: a missing text": (lambda known, folder: ItemVocabulary(["a", "b"], ["x", None]), "has no text"),
    "vocabulary: unknown id": (lambda known, folder: known.vocabulary.encode(["zz"]), "'zz'"),
    "vocabulary: internal id 0": (lambda known, folder: known.vocabulary.decode([0]), "internal id 0"),
    "vocabulary: internal id too high": (lambda known, folder: known.vocabulary.decode([13]), "outside 1..12"),
    "vocabulary: fractions": (lambda known, folder: known.vocabulary.decode([1.5]), "must be integers"),
    "vocabulary: no folder": (lambda known, folder: ItemVocabulary.from_pretrained(folder), "vocabulary.json"),
    "vocabulary: torn": (
        lambda known, folder: (
            (folder / "vocabulary.json").write_text('{"format'),
            ItemVocabulary.from_pretrained(folder),
        ),
        "damaged",
    ),
    # splits
    "split: an item that is not in the vocabulary": (
        lambda known, folder: split_leave_one_out(
            load_interactions(
                pd.DataFrame({"user_id": [1] * 3, "item_id": ["i00", "i01", "new"], "timestamp": [1, 2, 3]})
            ),
            known.vocabulary,
        ),
        "'new'",
    ),
    "split: users with too few items": (
        lambda known, folder: split_leave_one_out(
            load_interactions(pd.DataFrame({"user_id": [1, 2], "item_id": ["i00", "i01"], "timestamp": [1, 2]})),
            known.vocabulary,
        ),
        "no user has 3 interactions",
    ),
    "split: too short a history": (
        lambda known, folder: split_leave_one_out(text(LOG)(known, folder), known.vocabulary, min_length=2),
        "min_length=2",
    ),
    "split: moments out of order": (
        lambda known, folder: split_by_time(
            text(LOG)(known, folder),
            ItemVocabulary([f"i{n}" for n in range(5)]),
            validation_time=4,
            test_time=2,
        ),
        "validation must start first",
    ),
    "k-core: nobody left": (lambda known, folder: k_core(text(LOG)(known, folder), 9, 9), "9"),
    # batches
    "collator: no rows": (lambda known, folder: SequenceCollator()([]), "no rows"),
    "collator: a row of one item": (lambda known, folder: SequenceCollator()([{"item_ids": [1]}]), "fewer than 2"),
    "collator: id 0": (lambda known, folder: SequenceCollator()([{"item_ids": [1, 0]}]), "ids start at 1"),
    "collator: max_length": (lambda known, folder: SequenceCollator(max_length=0), "max_length=0"),
    # losses and ranks
    "loss: temperature 0": (loss(temperature=0.0), "temperature must be positive"),
    "loss: temperature NaN": (loss(temperature=float("nan")), "temperature must be positive"),
    "loss: weighting": (loss(weighting="best"), "weighting must be one of"),
    "loss: rank_base": (loss(rank_base=2), "rank_base must be 0 or 1"),
    "loss: widths": (loss(hidden=torch.ones(3, 4)), "hidden must be (P, d)"),
    "loss: label 0": (loss(labels=torch.tensor([0, 1, 2])), "labels must be in 1..4"),
    "loss: label beyond the catalogue": (loss(labels=torch.tensor([1, 2, 5])), "labels must be in 1..4"),
    "loss: number of labels": (loss(labels=torch.tensor([1])), "labels must be of shape"),
    "loss: half a teacher": (loss(teacher_hidden=torch.ones(3, 2)), "give both or neither"),
    "loss: a teacher over other items": (
        loss(teacher_hidden=torch.ones(3, 2), teacher_item_matrix=torch.ones(9, 2)),
        "The teacher scores 8 items",
    ),
    "loss: a teacher of other positions": (
        loss(teacher_hidden=torch.ones(2, 2), teacher_item_matrix=torch.ones(5, 2)),
        "teacher_hidden must be of shape",
    ),
    "weights: base": (lambda known, folder: rank_weights(torch.ones(1), torch.ones(1), base=3), "base"),
    "ranks: NaN scores": (ranks(hidden=torch.full((3, 2), torch.nan)), "Non-finite scores"),
    "ranks: ties": (ranks(ties="random"), "ties='random'"),
    "ranks: label": (ranks(labels=torch.tensor([1, 2, 9])), "outside 1..4"),
    "ranks: seen": (ranks(seen=torch.tensor([[9], [0], [0]])), "Seen items"),
    "ranks: chunk": (ranks(chunk_size=0), "chunk_size=0"),
    "metrics: none": (lambda known, folder: ranking_metrics([]), "no ranks"),
    "metrics: rank 0": (lambda known, folder: ranking_metrics([1, 0]), "Ranks start at 1"),
    "metrics: k": (lambda known, folder: ranking_metrics([1], ks=(0,)), "cut-off"),
    # models
    "recommend: k": (lambda known, folder: known.crm.recommend([["i00"]], k=0), "k must be at least 1"),
    "recommend: an unknown item": (lambda known, folder: known.crm.recommend([["zz"]]), "'zz'"),
    "recommend: an empty history": (lambda known, folder: known.crm.recommend([[]]), "History 0"),
    "recommend: a candidate outside the catalogue": (
        lambda known, folder: known.crm.recommend([["i00"]], candidates=["zz"]),
        "'zz'",
    ),
    "recommend: no vocabulary": (
        lambda known, folder: tiny_runs.make_crm().recommend([["i00"]]),
        "no item vocabulary",
    ),
    "llm: supervision": (
        lambda known, folder: LLMRecommender.from_backbone(
            known.llm.backbone, 12, tokenizer=known.llm.tokenizer, supervision="first"
        ),
        "supervision must be one of",
    ),
    "llm: a prompt without history": (
        lambda known, folder: LLMRecommender.from_backbone(
            known.llm.backbone, 12, tokenizer=known.llm.tokenizer, prompt="hello"
        ),
        "{history}",
    ),
    "llm: texts": (
        lambda known, folder: LLMRecommender.from_backbone(
            known.llm.backbone, 12, tokenizer=known.llm.tokenizer, item_texts=["a"]
        ),
        "1 texts for 12 items",
    ),
    "llm: item vectors of another width": (
        lambda known, folder: known.llm.set_item_vectors(torch.ones(13, 5)),
        "item_dim=5",
    ),
    # trainers and arguments
    "trainer: another model": (
        lambda known, folder: CRMTrainer(torch.nn.Linear(2, 2), crm_args(folder)),
        "trains a RecommenderModel",
    ),
    "trainer: arguments of the other direction": (
        lambda known, folder: MutualDistillTrainer(known.llm, crm_args(folder)),
        "arguments of another trainer",
    ),
    "trainer: a teacher over more items": (
        lambda known, folder: CRMTrainer(
            known.crm, crm_args(folder), known.splits["train"], teacher=SASRecModel(SASRecConfig(num_items=20))
        ),
        "The teacher scores 20 items",
    ),
    "trainer: a teacher with another vocabulary": (
        lambda known, folder: CRMTrainer(
            known.crm, crm_args(folder), teacher=with_vocabulary(tiny_runs.make_crm(), known.other)
        ),
        "different item vocabularies: ",
    ),
    "trainer: a cache with another vocabulary": (
        lambda known, folder: CRMTrainer(
            with_vocabulary(tiny_runs.make_crm(), known.other), crm_args(folder), teacher=known.cache
        ),
        "different item vocabularies: ",
    ),
    "trainer: a cache of other data": (
        lambda known, folder: CRMTrainer(known.crm, crm_args(folder), known.splits["validation"], teacher=known.cache),
        "does not fit: its data_hash",
    ),
    "arguments: temperature": (lambda known, folder: crm_args(folder, temperature=-1), "temperature must be positive"),
    "arguments: kl_weight": (lambda known, folder: crm_args(folder, kl_weight=-1), "kl_weight must not be negative"),
    "arguments: weighting": (lambda known, folder: crm_args(folder, weighting="x"), "weighting must be one of"),
    "arguments: seen items": (lambda known, folder: crm_args(folder, seen_items="x"), "seen_items must be one of"),
    "arguments: chunk": (lambda known, folder: crm_args(folder, loss_chunk_size=0), "loss_chunk_size"),
    "arguments: patience": (
        lambda known, folder: crm_args(folder, early_stopping_patience=0),
        "early_stopping_patience",
    ),
    # caches
    "cache: none": (lambda known, folder: TeacherCache(folder), "There is no teacher cache"),
    "cache: foreign": (
        lambda known, folder: ((folder / "manifest.json").write_text('{"format_version": 2}'), TeacherCache(folder)),
        "damaged (no data_hash)",
    ),
    "cache: of the future": (
        lambda known, folder: ((folder / "manifest.json").write_text('{"format_version": 99}'), TeacherCache(folder)),
        "format version 99",
    ),
    "cache: rows of one id": (
        lambda known, folder: TeacherCache.build(
            known.crm, rows([1, 2, 3]).map(lambda row: {"row_id": -1}), folder / "cache"
        ),
        "row_id",
    ),
    # runs
    "run: rounds": (lambda known, folder: a_run(known, folder, config={"rounds": 0}), "rounds must be at least 1"),
    "run: refresh": (lambda known, folder: a_run(known, folder, config={"refresh": "x"}), "refresh must be one of"),
    "run: a split that is missing": (
        lambda known, folder: a_run(known, folder, sequences=datasets.DatasetDict(train=known.splits["train"])),
        "validation is missing",
    ),
    "run: a vocabulary of another size": (
        lambda known, folder: a_run(known, folder, vocabulary=ItemVocabulary(["a", "b"])),
        "the vocabulary holds 2",
    ),
    "run: a CRM of another vocabulary": (
        lambda known, folder: a_run(known, folder, crm=with_vocabulary(tiny_runs.make_crm(), known.other)),
        "The CRM has another vocabulary than this run: ",
    ),
    "run: an LLM of another vocabulary": (
        lambda known, folder: a_run(
            known, folder, llm=with_vocabulary(tiny_runs.make_llm(known.vocabulary), known.other)
        ),
        "The LLM has another vocabulary than this run: ",
    ),
    "run: sequences beyond the vocabulary": (
        lambda known, folder: a_run(known, folder, sequences=sequences_with(13)),
        "hold the item id 13, outside of the vocabulary's 1..12",
    ),
    "run: sequences with padding in them": (
        lambda known, folder: a_run(known, folder, sequences=sequences_with(0)),
        "hold the item id 0",
    ),
    "run: item vectors that do not fit": (
        lambda known, folder: a_run(known, folder, crm=GRU4RecModel(GRU4RecConfig(num_items=12, hidden_size=16))),
        "item_dim=16",
    ),
    "run: metrics that do not compare": (
        lambda known, folder: a_run(known, folder, crm_args={"seen_items": "keep"}),
        "agree on seen_items",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_malformed_input_has_one_clear_error(known, tmp_path, name):
    case, message = CASES[name]
    with pytest.raises(LLMD4RecError, match=re.escape(message)):
        case(known, tmp_path)


def test_there_are_sixty_cases():
    assert len(CASES) >= 60


# Input that looks wrong and is not.
GOOD = {
    "byte order mark": ("\ufeff" + LOG).encode(),
    "line ends of Windows": LOG.replace("\n", "\r\n").encode(),
    "line ends of old Macs": LOG.replace("\n", "\r").encode(),
    "duplicate rows": (LOG + LOG.split("\n", 1)[1]).encode(),
    "ids of mixed types": (HEADER + "1,a,1\nx,2,2\n").encode(),
    "Latin-1": (HEADER + "José,i,1\n").encode("latin-1"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_only_looks_wrong_is_read(tmp_path, name):
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD[name])
    assert len(load_interactions(path)) >= 1


def test_a_title_of_a_hundred_thousand_characters_is_cut(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\n1," + "long " * 20000 + "\n2,\n")
    texts = load_items(path)["text"]
    assert len(texts[0]) <= 512
    assert texts[1] == "2"


def test_more_recommendations_than_items_are_all_items(known):
    assert len(known.crm.recommend([["i00"]], k=1000).ids[0]) == 11


# --- anything at all -------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.one_of(
    st.text(max_size=6),
    st.integers(-(2**70), 2**70).map(str),
    st.sampled_from(["", "NaN", "inf", "-1", "1e400", "2021-01-01", '"', "\x00", "a,b", "\ufeff"]),
)


def is_read_or_refused(load, source) -> None:
    """Anything but a data set or an error of this package fails the test by itself."""
    try:
        assert len(load(source)) > 0
    except LLMD4RecError as error:
        assert str(error)


@FUZZ
@given(
    content=st.binary(max_size=300), suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet", ".dat"])
)
@example(content=b"\x01\r\t", suffix=".csv")
@example(content=b"\t\x80\r", suffix=".csv")
def test_any_bytes_are_a_log_or_refused(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("fuzz") / f"log{suffix}"
    path.write_bytes(content)
    is_read_or_refused(load_interactions, path)
    is_read_or_refused(load_items, path)


@FUZZ
@given(table=st.lists(st.lists(WORDS, min_size=1, max_size=4), max_size=6), header=st.booleans())
def test_any_rows_are_a_log_or_refused(tmp_path_factory, table, header):
    path = tmp_path_factory.mktemp("fuzz") / "log.csv"
    lines = [",".join(row) for row in table]
    path.write_bytes((HEADER * header + "\n".join(lines)).encode("utf-8", "surrogatepass"))
    is_read_or_refused(load_interactions, path)


VALUES = st.one_of(
    st.none(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=4), st.booleans(), st.binary(max_size=3)
)


@FUZZ
@given(table=st.lists(st.tuples(VALUES, VALUES, VALUES), min_size=1, max_size=5))
def test_any_frame_is_a_log_or_refused(table):
    is_read_or_refused(
        load_interactions, pd.DataFrame(table, columns=["user_id", "item_id", "timestamp"], dtype=object)
    )


@FUZZ
@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_cache_is_found(known, tmp_path_factory, damage):
    """Except in what does not count, such as spaces of its manifest."""
    names = sorted(path.name for path in known.cache.directory.iterdir() if path.name != "manifest.json")
    folder = tmp_path_factory.mktemp("fuzz")
    for name in [*names, "manifest.json"]:
        (folder / name).write_bytes((known.cache.directory / name).read_bytes())
    for place, change in damage:
        path = folder / names[place % len(names)]
        content = np.frombuffer(path.read_bytes(), np.uint8).copy()
        content[place % len(content)] += np.uint8(change)
        path.write_bytes(content.tobytes())
    if any((folder / name).read_bytes() != (known.cache.directory / name).read_bytes() for name in names):
        with pytest.raises(CacheError, match="missing, torn or altered"):
            TeacherCache(folder)
