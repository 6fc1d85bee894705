# SPDX-License-Identifier: Apache-2.0
"""Similar items, and recommendations in the forms that other tools read: their metrics must be ours."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from llmd4rec_hf import LLMRecommender, RecommenderModel, SASRecModel, ranking_metrics, target_ranks
from llmd4rec_hf.errors import ConfigurationError, DataError
from llmd4rec_hf.models import Recommendations
from llmd4rec_hf.models.recommendations import save_qrels


KS = (1, 2, 5, 12)


@pytest.fixture
def model(make_crm, vocabulary):
    model = make_crm()
    model.vocabulary = vocabulary
    return model


@pytest.fixture
def answers(model, splits, vocabulary):
    """`(users, true items, recommendations, our metrics)` of the test split, nothing masked."""
    rows = splits["test"]
    histories = [vocabulary.decode(row[:-1]) for row in rows["item_ids"]]
    targets = [vocabulary.decode(row[-1:])[0] for row in rows["item_ids"]]
    states = [model.eval().encode_last(torch.tensor([row[:-1][-6:]])) for row in rows["item_ids"]]
    labels = torch.tensor([row[-1] for row in rows["item_ids"]])
    metrics = ranking_metrics(target_ranks(torch.cat(states), model.item_matrix(), labels), KS)
    return rows["user_id"], targets, model.recommend(histories, 12, filter_seen=False), metrics


# --- similar items ---------------------------------------------------------------------------------------------------


def test_similar_items_are_the_nearest_rows(model, vocabulary):
    found = model.similar_items(["i03", "i00"], k=4, batch_size=1)
    cosines = F.cosine_similarity(model.item_matrix()[None, 1:], model.item_matrix()[[4, 1]][:, None], dim=2)
    for row, item, ids, scores in zip(cosines, (3, 0), found.ids, found.scores, strict=True):
        order = [index for index in row.argsort(descending=True).tolist() if index != item][:4]
        assert ids == [vocabulary.item_ids[index] for index in order]
        assert scores == pytest.approx(row[order].tolist(), abs=1e-6)


def test_no_item_is_similar_to_itself_and_none_is_padding(model):
    found = model.similar_items(["i05"], k=100)
    assert len(found.ids[0]) == 11
    assert "i05" not in found.ids[0]
    assert all(-1.0001 <= score <= 1.0001 for score in found.scores[0])


def test_similar_items_among_candidates(model):
    everything = model.similar_items(["i05"], k=100).ids[0]
    chosen = [everything[4], "i05", everything[1], "i99"]
    found = model.similar_items(["i99", "i05"], candidates=chosen, on_unknown="ignore")
    assert found.ids == [[], [everything[1], everything[4]]]
    assert found.scores[0] == [] and len(found.scores[1]) == 2
    with pytest.raises(DataError, match="first 'i99'"):
        model.similar_items(["i05"], candidates=chosen)


def test_similar_items_of_an_llm(make_llm, vocabulary):
    llm = make_llm().train()
    llm.vocabulary = vocabulary
    assert len(llm.similar_items(["i01"], k=3).ids[0]) == 3
    assert llm.training


@pytest.mark.parametrize(("items", "k", "error"), [(["x"], 1, DataError), (["i01"], 0, ConfigurationError)])
def test_similar_items_of_a_bad_request(model, items, k, error):
    with pytest.raises(error):
        model.similar_items(items, k)


def test_similar_items_need_a_vocabulary(make_crm):
    with pytest.raises(ConfigurationError, match="vocabulary"):
        make_crm().similar_items([1])


# --- loading whatever it is ------------------------------------------------------------------------------------------


def test_the_base_class_loads_any_recommender(model, make_llm, vocabulary, tmp_path):
    llm = make_llm()
    llm.vocabulary = vocabulary
    for kind in (model, llm):
        kind.save_pretrained(tmp_path / type(kind).__name__)
        loaded = RecommenderModel.from_pretrained(tmp_path / type(kind).__name__)
        assert type(loaded) is type(kind)
        assert loaded.vocabulary == vocabulary
    assert type(SASRecModel.from_pretrained(tmp_path / "SASRecModel")) is SASRecModel


def test_what_is_no_recommender_is_refused(make_llm, tmp_path):
    make_llm().backbone.save_pretrained(tmp_path / "backbone")
    with pytest.raises(ConfigurationError, match="which is no recommender"):
        RecommenderModel.from_pretrained(tmp_path / "backbone")
    for kind in (RecommenderModel, LLMRecommender, SASRecModel):
        with pytest.raises(ConfigurationError, match="Cannot load a recommender from"):
            kind.from_pretrained(tmp_path / "nowhere")


# --- other tools -----------------------------------------------------------------------------------------------------


def test_a_frame_with_users(answers):
    users, _, found, _ = answers
    frame = found.to_pandas(users)
    assert list(frame.columns) == ["user_id", "item_id", "score", "rank"]
    assert frame["user_id"].tolist() == [user for user in users for _ in range(12)]
    assert frame["rank"].tolist() == list(range(1, 13)) * len(users)


def test_metrics_of_the_frame_by_their_formulas_are_ours(answers):
    users, targets, found, ours = answers
    truth = pd.DataFrame({"user_id": users, "item_id": targets})
    ranks = truth.merge(found.to_pandas(users), on=["user_id", "item_id"], how="left")["rank"]
    for k in KS:
        assert ours[f"hr@{k}"] == pytest.approx((ranks <= k).mean(), abs=1e-12)
        gains = ranks.map(lambda rank, k=k: 1 / math.log2(rank + 1) if rank <= k else 0.0)
        assert ours[f"ndcg@{k}"] == pytest.approx(gains.mean(), abs=1e-12)
        assert ours[f"mrr@{k}"] == pytest.approx((1 / ranks).where(ranks <= k, 0.0).mean(), abs=1e-12)


def test_ranx_agrees(answers, tmp_path):
    ranx = pytest.importorskip("ranx")
    users, targets, found, ours = answers
    found.save_trec(tmp_path / "a.run", users)
    save_qrels(tmp_path / "a.qrels", users, targets)
    qrels = ranx.Qrels.from_file(str(tmp_path / "a.qrels"), kind="trec")
    for run in (ranx.Run.from_file(str(tmp_path / "a.run"), kind="trec"), ranx.Run(found.to_run(users))):
        names = [f"{name}@{k}" for name in ("hit_rate", "ndcg", "mrr") for k in KS]
        for name, value in ranx.evaluate(qrels, run, names, make_comparable=True).items():
            assert ours[name.replace("hit_rate", "hr")] == pytest.approx(value, abs=1e-9)


def test_rectools_agrees(answers):
    metrics = pytest.importorskip("rectools.metrics")
    users, targets, found, ours = answers
    truth = pd.DataFrame({"user_id": users, "item_id": targets})
    wanted = {}
    for k in KS:
        wanted |= {f"hr@{k}": metrics.HitRate(k=k), f"mrr@{k}": metrics.MRR(k=k)}
        wanted[f"ndcg@{k}"] = metrics.NDCG(k=k, divide_by_achievable=True)
    for name, value in metrics.calc_metrics(wanted, found.to_pandas(users), truth).items():
        assert ours[name] == pytest.approx(value, abs=1e-9)


def test_trec_files(tmp_path):
    found = Recommendations([["a", 7], []], [[0.1, -2.0], []])
    found.save_trec(tmp_path / "run", ["u", "v"], run_name="mine")
    assert (tmp_path / "run").read_text() == "u Q0 a 1 0.1 mine\nu Q0 7 2 -2.0 mine\n"
    save_qrels(tmp_path / "qrels", ["u", "v"], [7, "b"])
    assert (tmp_path / "qrels").read_text() == "u 0 7 1\nv 0 b 1\n"
    assert found.to_run() == {"0": {"a": 0.1, "7": -2.0}, "1": {}}


def test_what_trec_cannot_hold(tmp_path):
    found = Recommendations([["a b"]], [[1.0]])
    with pytest.raises(DataError, match="'a b' cannot stand in a TREC file.*take ids without spaces"):
        found.save_trec(tmp_path / "run")
    with pytest.raises(DataError, match="2 user ids for 1 histories"):
        found.to_pandas(["u", "v"])
    with pytest.raises(DataError, match="a user twice"):
        Recommendations([[], []], [[], []]).to_run(["u", "u"])
    with pytest.raises(DataError, match="1 true items for 2 users"):
        save_qrels(tmp_path / "qrels", ["u", "v"], ["a"])


def test_recommendations_as_a_table():
    table = Recommendations([["a", "b"], [], ["c"]], [[2.0, 1.0], [], [0.5]]).to_pandas()
    expected = pd.DataFrame(
        {"history": [0, 0, 2], "item_id": ["a", "b", "c"], "score": [2.0, 1.0, 0.5], "rank": [1, 2, 1]}
    )
    pd.testing.assert_frame_equal(table, expected)
