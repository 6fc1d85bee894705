# SPDX-License-Identifier: Apache-2.0
"""`recommend`, on a model whose scores can be read off, and on those of every kind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from llmd4rec_hf.data import ItemVocabulary
from llmd4rec_hf.errors import ConfigurationError, DataError, UnknownItemsError
from llmd4rec_hf.models import Recommendations, RecommenderModel


class TableConfig(PreTrainedConfig):
    model_type = "test-table"
    num_items: int = 5
    max_length: int = 3


# Row: the last item of a history. Column: the score of the item that comes next.
TABLE = torch.tensor(
    [
        [9.0, 9.0, 9.0, 9.0, 9.0, 9.0],
        [9.0, 0.5, 0.4, 0.3, 0.2, 0.1],
        [9.0, 0.1, 0.2, 0.3, 0.4, 0.5],
        [9.0, -5.0, -4.0, -3.0, -1.0, -2.0],
        [9.0, 7.0, 0.0, 8.0, 6.0, 5.0],
        [9.0, 1.0, 2.0, 5.0, 4.0, 3.0],
    ]
)


class TableModel(RecommenderModel):
    """A recommender whose scores can be read off: also the least that a recommender of one's own must do."""

    config_class = TableConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Parameter(TABLE.T.clone())
        self.widths = []

    def encode(self, item_ids, attention_mask=None):
        self.widths.append(tuple(item_ids.shape))
        return F.one_hot(item_ids, self.config.num_items + 1).float()

    def item_matrix(self):
        return self.table


@pytest.fixture(params=[[f"B{number}" for number in range(1, 6)], [10, 20, 30, 40, 50]], ids=["str", "int"])
def table(request):
    model = TableModel(TableConfig())
    model.vocabulary = ItemVocabulary(request.param)
    model.external = lambda *internal: [request.param[item - 1] for item in internal]
    return model


def test_recommend(table):
    e = table.external
    found = table.recommend([e(1), e(1, 2), e(5, 3)], k=2)
    assert isinstance(found, Recommendations)
    assert found.ids == [e(2, 3), e(5, 4), e(4, 2)]
    assert found.scores == [pytest.approx([0.4, 0.3]), pytest.approx([0.5, 0.4]), pytest.approx([-1.0, -4.0])]
    assert all(type(item) is type(e(1)[0]) for items in found.ids for item in items)


def test_recommend_seen_items(table):
    e = table.external
    assert table.recommend([e(1)], k=2, filter_seen=False).ids == [e(1, 2)]
    # Seen long ago, beyond what the model reads, is seen all the same.
    assert table.recommend([e(4, 3, 2, 1, 5)], k=5).ids == [[]]
    assert table.recommend([e(3, 2, 1, 1, 5)], k=5).ids == [e(4)]


def test_recommend_among_candidates(table):
    e = table.external
    assert table.recommend([e(1), e(2)], candidates=e(4, 2)).ids == [e(2, 4), e(4)]
    assert table.recommend([e(1)], candidates=iter(e(1, 5)), filter_seen=False).ids == [e(1, 5)]
    assert table.recommend([e(1)], candidates=e(1)).ids == [[]]
    assert table.recommend([e(1)], candidates=[]).ids == [[]]


def test_recommend_more_than_there_is(table):
    found = table.recommend([table.external(1)], k=100, filter_seen=False)
    assert found.ids == [table.external(1, 2, 3, 4, 5)], "the padding item is never recommended"
    assert len(found.scores[0]) == 5


def test_recommend_in_batches(table):
    e = table.external
    histories = [e(item) for item in (1, 2, 3, 4, 5, 1, 2)]
    whole = table.recommend(histories, k=3)
    table.widths.clear()
    assert table.recommend(histories, k=3, batch_size=2) == whole
    assert table.widths == [(2, 1), (2, 1), (2, 1), (1, 1)]
    assert table.recommend([]) == Recommendations([], [])


def test_recommend_reads_the_newest_items(table):
    table.recommend([table.external(1, 2, 3, 4, 5)])
    assert table.widths == [(1, 3)]


def test_recommend_unknown_items(table):
    e = table.external
    unknown = type(e(1)[0])("99")
    with pytest.raises(DataError, match="not in the vocabulary, first '?99"):
        table.recommend([[*e(1), unknown]])
    with pytest.raises(DataError, match="not in the vocabulary"):
        table.recommend([e(1)], candidates=[unknown])
    found = table.recommend([[*e(1), unknown]], k=1, on_unknown="ignore", candidates=[unknown, *e(3)])
    assert found.ids == [e(3)]
    found = table.recommend([[unknown], e(1), [], e(5, 3)], k=1, on_unknown="ignore", batch_size=1)
    assert found.ids == [[], e(2), [], e(4)]
    assert [len(scores) for scores in found.scores] == [0, 1, 0, 1]
    assert table.recommend([[unknown]], on_unknown="ignore").ids == [[]]
    with pytest.raises(DataError, match="History 1 is empty"):
        table.recommend([e(1), []])


def test_a_text_is_no_list_of_its_letters(table):
    """With items named 1 to 5, "12" would be a history of 1 and 2."""
    for history in ("12", 12):
        with pytest.raises(DataError, match="History 1 must be a list, got '?12"):
            table.recommend([table.external(1), history])
        with pytest.raises(DataError, match="item_ids must be a list, got '?12"):
            table.similar_items(history)
        with pytest.raises(DataError, match="candidates must be a list, got '?12"):
            table.recommend([table.external(1)], candidates=history)
    with pytest.raises(DataError, match="histories must be a list, got '12'"):
        table.recommend("12")


def test_errors_name_the_remedies_of_what_was_called(table):
    unknown = type(table.external(1)[0])("99")
    for call in (lambda: table.recommend([[unknown]]), lambda: table.similar_items([unknown])):
        with pytest.raises(UnknownItemsError, match="; on_unknown='ignore' leaves them out"):
            call()
    with pytest.raises(ConfigurationError, match="on_unknown must be 'raise' or 'ignore', got 'zero'"):
        table.recommend([[unknown]], on_unknown="zero")


def test_recommend_errors(table):
    with pytest.raises(ConfigurationError, match="k must be at least 1, got 0"):
        table.recommend([table.external(1)], k=0)
    table.vocabulary = None
    with pytest.raises(ConfigurationError, match="set `model.vocabulary`"):
        table.recommend([[1]])


@pytest.mark.parametrize("training", [True, False])
def test_recommend_runs_in_evaluation_mode(make_model, training):
    """Dropout must be off meanwhile, and on again afterwards."""
    model = make_model("sasrec", dropout=0.5).train(training)
    model.vocabulary = ItemVocabulary(list(range(1, 13)))
    assert model.recommend([[1, 2, 3]], k=5) == model.recommend([[1, 2, 3]], k=5)
    assert all(module.training == training for module in model.modules())


def test_recommend_is_the_highest_scores(kind, still_model, batch):
    model = still_model(kind)
    model.vocabulary = ItemVocabulary(list(range(1, 13)))
    histories = [ids[ids > 0].tolist() for ids in batch["item_ids"]]
    found = model.recommend(histories, k=3)
    scores = model.encode_last(batch["item_ids"]) @ model.item_matrix().T
    model.vocabulary = None
    for history, row, ids, values in zip(histories, scores, found.ids, found.scores, strict=True):
        best = [item for item in row.argsort(descending=True).tolist() if item and item not in history][:3]
        assert ids == best
        assert values == pytest.approx(row[best].tolist(), rel=1e-4)
