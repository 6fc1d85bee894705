# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from llmd4rec_hf import CRMTrainer, ItemVocabulary, RecommenderEnsemble, TeacherCache
from llmd4rec_hf.data import SequenceCollator
from llmd4rec_hf.errors import ConfigurationError


ITEM_IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])
MASK = (ITEM_IDS != 0).long()


@pytest.fixture
def members(make_crm, make_llm, vocabulary):
    """Models of different kinds, widths (8, 16) and longest histories (6, 4)."""
    crm, llm = make_crm(0, max_length=4).eval(), make_llm(1).eval()
    crm.vocabulary = llm.vocabulary = vocabulary
    return [crm, llm]


@torch.no_grad()
def scores(model, encode="encode") -> torch.Tensor:
    return getattr(model, encode)(ITEM_IDS, MASK) @ model.item_matrix().T


def test_its_scores_are_the_mean_of_its_members(members):
    ensemble = RecommenderEnsemble(members)
    assert ensemble.item_matrix().shape == (13, 24)
    assert ensemble.config.num_items == 12
    assert ensemble.config.max_length == 4
    for encode in ("encode", "encode_last"):
        expected = (scores(members[0], encode) + scores(members[1], encode)) / 2
        torch.testing.assert_close(scores(ensemble, encode), expected)


def test_it_recommends(members, vocabulary):
    ensemble = RecommenderEnsemble(members)
    last = scores(ensemble, "encode_last")[0]
    last[[0, 1, 2, 3]] = -torch.inf
    best = [vocabulary.decode([index])[0] for index in last.topk(3).indices.tolist()]
    assert ensemble.recommend([vocabulary.decode([1, 2, 3])], k=3).ids == [best]


def test_a_cache_holds_what_it_says(members, splits, tmp_path):
    ensemble = RecommenderEnsemble(members)
    cache = TeacherCache.build(ensemble, splits["train"], tmp_path / "cache")
    assert cache.vocabulary.item_ids == members[0].vocabulary.item_ids
    batch = SequenceCollator(max_length=4)([splits["train"][row] for row in (0, 3)])
    found = cache.lookup(batch["row_id"], batch["labels"], batch["attention_mask"])
    with torch.no_grad():
        hidden = ensemble.encode(batch["item_ids"], batch["attention_mask"])[batch["labels"] != -100]
    torch.testing.assert_close(found @ cache.item_matrix.T, hidden @ ensemble.item_matrix().T)


def test_it_teaches(members, make_crm, make_arguments, splits):
    """More weight on the teacher brings the student closer to it."""
    teacher, agreement = RecommenderEnsemble(members), []
    for weight in (0.0, 20.0):
        settings = {"kl_weight": weight, "weighting": "none", "learning_rate": 0.02, "num_train_epochs": 20}
        student = make_crm(3, max_length=4)
        CRMTrainer(student, make_arguments(f"w{weight}", **settings), splits["train"], teacher=teacher).train()
        student.eval()
        log_ratio = scores(teacher).log_softmax(-1) - scores(student).log_softmax(-1)
        agreement.append((scores(teacher).softmax(-1) * log_ratio).sum(-1)[MASK.bool()].mean())
    assert agreement[1] < agreement[0] / 4


def test_its_hash_follows_its_members(members, make_crm):
    ensemble = RecommenderEnsemble(members)
    assert ensemble.content_hash() == RecommenderEnsemble(list(members)).content_hash()
    assert ensemble.content_hash() != RecommenderEnsemble([make_crm(5, max_length=4), members[1]]).content_hash()
    assert ensemble.content_hash() != RecommenderEnsemble(members[::-1]).content_hash()


def test_members_that_do_not_go_together_are_refused(members, make_crm):
    with pytest.raises(ConfigurationError, match="two members or more, got 1"):
        RecommenderEnsemble(members[:1])
    with pytest.raises(ConfigurationError, match=r"score \[12, 7\] items"):
        RecommenderEnsemble([members[0], make_crm(0, num_items=7)])
    other = make_crm(2)
    other.vocabulary = ItemVocabulary([f"x{index:02d}" for index in range(12)])
    with pytest.raises(ConfigurationError, match="different vocabularies"):
        RecommenderEnsemble([*members, other])


def test_it_is_not_saved(members, tmp_path):
    with pytest.raises(ConfigurationError, match="save its members"):
        RecommenderEnsemble(members).save_pretrained(tmp_path)


@pytest.mark.parametrize("training", [True, False])
def test_its_mode_is_that_of_its_members(members, training):
    for member in members:
        member.train(training)
    assert RecommenderEnsemble(members).training is training


def test_members_stay_in_their_modes(members, splits, tmp_path):
    members[0].eval()
    members[1].train()
    TeacherCache.build(RecommenderEnsemble(members), splits["train"], tmp_path / "cache")
    assert [member.training for member in members[:2]] == [False, True]
