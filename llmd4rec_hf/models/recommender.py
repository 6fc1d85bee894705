# SPDX-License-Identifier: Apache-2.0
"""The one protocol of this package: a hidden state per position, and an item matrix."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..data import ItemVocabulary
from ..data.vocabulary import VOCABULARY_FILE
from ..distillation.loss import distillation_loss
from ..errors import ConfigurationError, DataError, UnknownItemsError
from ..modes import evaluating
from .recommendations import Recommendations
from .weights import find_file, hash_tensors, loading, remove_weights, stored_weights


_PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")
_FINDS_THE_KIND = "RecommenderModel.from_pretrained finds the right kind."


@dataclass
class RecommenderOutput(ModelOutput):
    """
    Output of every [`RecommenderModel`].

    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            Next-item cross-entropy over all items, in nats.
        hidden (`torch.FloatTensor` of shape `(B, T, d)`, or `(B, d)` with `last_only`):
            Hidden state per position; `hidden @ item_matrix.T` are the scores of the item that comes next.
        item_matrix (`torch.FloatTensor` of shape `(N + 1, d)`, or `(K, d)` with `items`):
            One row per item, row 0 is padding; with `items` only theirs.
    """

    loss: torch.FloatTensor | None = None
    hidden: torch.FloatTensor | None = None
    item_matrix: torch.FloatTensor | None = None


class RecommenderModel(PreTrainedModel):
    """
    Base class of all recommenders: the conventional ones and the LLM.

    A subclass implements [`~RecommenderModel.encode`] and [`~RecommenderModel.item_matrix`]; loss, distillation in
    both directions, ranks, metrics, caching and `recommend` follow from these two. Its configuration must have
    `num_items` and `max_length`.

    Attributes:
        vocabulary ([`ItemVocabulary`], *optional*): external item ids. Saved and loaded beside the weights.
    """

    base_model_prefix = "recommender"
    main_input_name = "item_ids"
    accepts_loss_kwargs = True

    def __init__(self, config: PreTrainedConfig):
        _check_sizes(config)
        super().__init__(config)
        # Neither is a prediction: a Trainer that collects a model's outputs must leave them where they are.
        config.keys_to_ignore_at_inference = ["hidden", "item_matrix"]
        self.vocabulary: ItemVocabulary | None = None

    # --- what a model must say -----------------------------------------------------------------------------------

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        """
        Hidden state after each item of each history.

        Args:
            item_ids (`torch.LongTensor` of shape `(B, T)`): internal ids in 1..N, padded with 0 on the right.
            attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 1 at items, 0 at padding.

        Returns:
            `torch.Tensor` of shape `(B, T, d)`. Position t depends on items 0..t of its own row alone.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `encode`.")

    def item_matrix(self) -> torch.Tensor:
        """The item matrix, of shape `(N + 1, d)`; row 0 is padding."""
        raise NotImplementedError(f"{type(self).__name__} must implement `item_matrix`.")

    # --- what follows --------------------------------------------------------------------------------------------

    @property
    def tied_embedding(self) -> nn.Embedding | None:
        """The embedding whose weights are the item matrix, or `None` if that is made in another way."""
        return self._embedding_of(self.item_matrix())

    def _embedding_of(self, weight: torch.Tensor) -> nn.Embedding | None:
        return next(
            (part for part in self.modules() if isinstance(part, nn.Embedding) and part.weight is weight), None
        )

    def item_rows(self, items: torch.LongTensor) -> torch.Tensor:
        """Rows `(K, d)` of the item matrix. Looked up in an embedding, they can have a sparse gradient."""
        item_matrix = self.item_matrix()
        embedding = self._embedding_of(item_matrix)
        return item_matrix[items] if embedding is None else embedding(items)

    @torch.no_grad()
    def set_item_vectors(self, vectors: torch.Tensor) -> None:
        """
        Put other item vectors, such as a teacher's, in place of the model's own.

        Args:
            vectors (`torch.Tensor` of shape `(N + 1, d)`): one row per item; row 0, padding, becomes zero.

        Raises:
            ConfigurationError: another shape, or a model whose item matrix is not the weight of an embedding.
        """
        embedding = self.tied_embedding
        if embedding is None:
            raise ConfigurationError(
                f"The item matrix of {type(self).__name__} is not the weight of an embedding: implement "
                "`set_item_vectors` to say where other vectors go."
            )
        if vectors.shape != embedding.weight.shape:
            raise ConfigurationError(
                f"The item vectors are of shape {tuple(vectors.shape)} and this model's of "
                f"{tuple(embedding.weight.shape)}."
            )
        embedding.weight.copy_(vectors)
        embedding.weight[0] = 0

    def encode_last(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        """Hidden state after the last item of each history, of shape `(B, d)`."""
        hidden = self.encode(item_ids, attention_mask)
        last = sequence_lengths(item_ids, attention_mask) - 1
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]

    def forward(
        self,
        item_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        row_id: torch.LongTensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        last_only: bool = False,
        items: torch.LongTensor | None = None,
    ) -> RecommenderOutput:
        """
        Args:
            item_ids (`torch.LongTensor` of shape `(B, T)`): internal ids, padded with 0 on the right.
            attention_mask (`torch.LongTensor` of shape `(B, T)`, *optional*): 1 at items, 0 at padding.
            labels (`torch.LongTensor` of shape `(B, T)`, *optional*): the next item at each position, -100 where
                there is none.
            row_id (`torch.LongTensor` of shape `(B,)`, *optional*): which rows these are. The collator gives it for
                the trainers' teacher caches; the model itself ignores it.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): what the summed loss is divided by; the number
                of labels in this batch by default.
            last_only (`bool`, *optional*, defaults to `False`): only the state after each history's last item, as
                `hidden` of shape `(B, d)`. Goes without `labels`.
            items (`torch.LongTensor` of shape `(K,)`, *optional*): ids of the items whose rows of the item matrix are
                wanted, all by default. Goes without `labels`.

        Returns:
            [`RecommenderOutput`]
        """
        encode = self.encode_last if last_only else self.encode
        hidden = encode(item_ids, attention_mask)
        if items is not None:
            return RecommenderOutput(hidden=hidden, item_matrix=self.item_rows(items))
        item_matrix = self.item_matrix()
        # A parameter that is an output itself looks unused to DistributedDataParallel; a view of it does not.
        item_matrix = item_matrix.view_as(item_matrix)
        loss = None
        if labels is not None:
            loss = distillation_loss(
                *supervised(hidden, labels, item_matrix), num_items_in_batch=num_items_in_batch, count_ranks=False
            ).loss
        return RecommenderOutput(loss=loss, hidden=hidden, item_matrix=item_matrix)

    @torch.no_grad()
    def recommend(
        self,
        histories: Sequence[Sequence],
        k: int = 10,
        *,
        filter_seen: bool = True,
        candidates: Iterable | None = None,
        on_unknown: str = "raise",
        batch_size: int = 256,
    ) -> Recommendations:
        """
        Best next items for histories of any user, known to the training or not.

        Args:
            histories (`Sequence[Sequence]`): external item ids per history, oldest first.
            k (`int`, *optional*, defaults to 10): how many items to recommend.
            filter_seen (`bool`, *optional*, defaults to `True`): leave out items of the history.
            candidates (`Iterable`, *optional*): external ids to choose from; all items by default.
            on_unknown (`str`, *optional*, defaults to `"raise"`): what to do with ids outside the vocabulary,
                `"raise"` or `"ignore"`; a history of which nothing is left then gets an empty list.
            batch_size (`int`, *optional*, defaults to 256): histories scored at a time.

        Returns:
            [`Recommendations`] on external ids.

        Raises:
            ConfigurationError: the model has no vocabulary, or `k` is not positive.
            DataError: a history that is no list, or an empty one, unless those are ignored.
            UnknownItemsError: an unknown item, unless they are ignored.
        """
        self._check_request(k)
        ids = [_id_list(history, f"History {index}") for index, history in enumerate(_id_list(histories, "histories"))]
        encoded = self._encode_histories(ids, on_unknown)
        answerable = [index for index, history in enumerate(encoded) if len(history) > 0]
        if on_unknown == "raise" and len(answerable) < len(encoded):
            empty = next(index for index, history in enumerate(encoded) if len(history) == 0)
            raise DataError(f"History {empty} is empty: there is nothing to recommend from.")
        allowed = self._candidate_mask(candidates, on_unknown)
        found = Recommendations([[] for _ in encoded], [[] for _ in encoded])
        with evaluating(self):
            item_matrix = self.item_matrix().float()
            for start in range(0, len(answerable), batch_size):
                rows = answerable[start : start + batch_size]
                best = self._recommend_batch([encoded[row] for row in rows], k, filter_seen, allowed, item_matrix)
                for row, (ids, scores) in zip(rows, best, strict=True):
                    found.ids[row], found.scores[row] = self.vocabulary.decode(ids), scores
        return found

    @torch.no_grad()
    def similar_items(
        self,
        item_ids: Sequence,
        k: int = 10,
        *,
        candidates: Iterable | None = None,
        on_unknown: str = "raise",
        batch_size: int = 256,
    ) -> Recommendations:
        """
        For each item the others that the model puts nearest to it: those that follow the same histories.

        Args:
            item_ids (`Sequence`): external item ids.
            k (`int`, *optional*, defaults to 10): how many to return for each.
            candidates (`Iterable`, *optional*): external ids to choose from; all items by default.
            on_unknown (`str`, *optional*, defaults to `"raise"`): what to do with ids outside the vocabulary,
                `"raise"` or `"ignore"`; an item that is ignored gets an empty list.
            batch_size (`int`, *optional*, defaults to 256): items compared with the catalogue at a time.

        Returns:
            [`Recommendations`] on external ids, one list per item and never the item itself. Scores are cosines of
            rows of the item matrix, in [-1, 1].

        Raises:
            ConfigurationError: the model has no vocabulary, or `k` is not positive.
            DataError: `item_ids` are no list.
            UnknownItemsError: an unknown item, unless it is ignored.
        """
        self._check_request(k)
        encoded = self._encode(_id_list(item_ids, "item_ids"), on_unknown)
        allowed = self._candidate_mask(candidates, on_unknown)
        with evaluating(self):
            directions = F.normalize(self.item_matrix().float(), dim=1)
        found = Recommendations([], [])
        for rows in torch.as_tensor(encoded, device=self.device).split(batch_size):
            cosines = directions[rows] @ directions.T
            cosines.masked_fill_(~allowed | (rows == 0).unsqueeze(1), -torch.inf)
            cosines.scatter_(1, rows.unsqueeze(1), -torch.inf)
            for ids, scores in _best(cosines, k):
                found.ids.append(self.vocabulary.decode(ids))
                found.scores.append(scores)
        return found

    def _check_request(self, k: int) -> None:
        if self.vocabulary is None:
            raise ConfigurationError(
                "This model has no item vocabulary, so it cannot read external ids: set `model.vocabulary`."
            )
        if k < 1:
            raise ConfigurationError(f"k must be at least 1, got {k}.")

    def _encode(self, item_ids: list, on_unknown: str) -> np.ndarray:
        """Internal ids in the places of external ones, 0 for those that are unknown and ignored."""
        if on_unknown not in ("raise", "ignore"):
            raise ConfigurationError(f"on_unknown must be 'raise' or 'ignore', got {on_unknown!r}.")
        try:
            return self.vocabulary.encode(item_ids, unknown="zero" if on_unknown == "ignore" else "raise")
        except UnknownItemsError as error:
            raise error.with_remedy("on_unknown='ignore' leaves them out.") from None

    def _encode_histories(self, histories: list[list], on_unknown: str) -> list[np.ndarray]:
        # All at once, because the vocabulary's index is built anew for every call.
        items = [item for history in histories for item in history]
        flat = self._encode(items, on_unknown)
        ends = np.cumsum([len(history) for history in histories], dtype=np.int64)
        encoded = (flat[end - len(history) : end] for history, end in zip(histories, ends, strict=True))
        return [history[history > 0] for history in encoded]

    def _candidate_mask(self, candidates, on_unknown) -> torch.Tensor:
        allowed = torch.zeros(self.config.num_items + 1, dtype=torch.bool, device=self.device)
        if candidates is None:
            allowed[1:] = True
        else:
            chosen = self._encode(_id_list(candidates, "candidates"), on_unknown)
            allowed[torch.as_tensor(chosen, dtype=torch.long, device=self.device)] = True
            allowed[0] = False
        return allowed

    def _recommend_batch(self, histories, k, filter_seen, allowed, item_matrix):
        recent = [torch.as_tensor(history, dtype=torch.long)[-self.config.max_length :] for history in histories]
        item_ids = torch.nn.utils.rnn.pad_sequence(recent, batch_first=True).to(self.device)
        scores = self.encode_last(item_ids).float() @ item_matrix.T
        scores.masked_fill_(~allowed, -torch.inf)
        if filter_seen:
            for row, history in enumerate(histories):
                scores[row, torch.as_tensor(history, dtype=torch.long, device=self.device)] = -torch.inf
        return _best(scores, k)

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ) -> None:
        """Save weights, configuration and, if there is one, the item vocabulary. See [`PreTrainedModel`]."""
        if not is_main_process:
            return
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSH_ARGUMENTS if name in kwargs} if push_to_hub else {}
        self.save_companions(save_directory)
        if kwargs.get("variant") is None:  # of which a folder holds several, side by side
            remove_weights(save_directory)
        super().save_pretrained(save_directory, **kwargs)
        if push_to_hub:
            # Not by the base class, which would upload only what it has written itself.
            repository = hub_kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(repository, **hub_kwargs)

    def save_companions(self, save_directory: str | os.PathLike) -> None:
        """Save what belongs to a model beside weights and configuration: the item vocabulary, if there is one."""
        if self.vocabulary is not None:
            self.vocabulary.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Load a model from a folder or the Hub, with its item vocabulary if there is one.

        `RecommenderModel.from_pretrained` loads any kind of recommender: its configuration says which.

        Raises:
            ConfigurationError: no model there, or a damaged one; weights or a vocabulary that do not fit the
                configuration or this class; called on this base class, a model that is no recommender.
        """
        if cls is RecommenderModel:
            kind = _class_of(pretrained_model_name_or_path, **hub_arguments(kwargs))
            return kind.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        asked = kwargs.pop("output_loading_info", False)
        with loading(pretrained_model_name_or_path, _FINDS_THE_KIND):
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        # What is missing would be drawn at random, and recommend at random.
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[kind])):
                raise ConfigurationError(
                    f"The weights in {str(pretrained_model_name_or_path)!r} do not fit a {cls.__name__}: "
                    f"{kind.replace('_', ' ')} {names[:3]}. {_FINDS_THE_KIND}"
                )
        model._load_vocabulary(pretrained_model_name_or_path, **hub_arguments(kwargs))
        return (model, info) if asked else model

    def _load_vocabulary(self, source, **hub_kwargs):
        path = find_file(source, VOCABULARY_FILE, **hub_kwargs)
        if path is not None:
            self.vocabulary = ItemVocabulary.from_pretrained(os.path.dirname(path))
            self.check_vocabulary()

    def check_vocabulary(self) -> None:
        """
        Raises:
            ConfigurationError: a vocabulary of more or fewer items than this model scores.
        """
        if self.vocabulary is not None and len(self.vocabulary) != self.config.num_items:
            raise ConfigurationError(
                f"The vocabulary holds {len(self.vocabulary)} items and the model scores {self.config.num_items}: "
                "they are of two trainings."
            )

    def portable_state(self, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """The tensors that [`~RecommenderModel.save_pretrained`] writes: what tells this model from another one."""
        return self.state_dict() if state_dict is None else state_dict

    def content_hash(self) -> str:
        """SHA-256 over what decides this model's scores: its own settings and [`~RecommenderModel.portable_state`]."""
        # Only what its configuration class takes: versions, paths and a Trainer's marks say nothing about scores.
        own = inspect.signature(type(self.config).__init__).parameters
        settings = {name: value for name, value in self.config.to_dict().items() if name in own}
        described = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256((described + hash_tensors(self.portable_state())).encode()).hexdigest()

    def added_settings(self) -> dict:
        """Settings beside the configuration's own that decide what is learned, flat: those of an adapter."""
        return {}

    def load_weights(self, directory: str | os.PathLike) -> None:
        """
        Bring the weights of a folder that [`~PreTrainedModel.save_pretrained`] wrote into this model, in place.

        Raises:
            ConfigurationError: torn weights, or those of another model.
        """
        try:
            weights = stored_weights(directory)
            # Of which only one is stored. A model that never calls `post_init` has not looked for them.
            for tied, source in getattr(self, "all_tied_weights_keys", {}).items():
                if tied not in weights and source in weights:
                    weights[tied] = weights[source]
            self.load_state_dict(weights)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise ConfigurationError(f"The weights in {directory} do not fit this model: {error}") from error


def _class_of(source: str | os.PathLike, **hub_kwargs) -> type[RecommenderModel]:
    """The kind of recommender that a folder or a Hub repository holds."""
    with loading(source):
        config = AutoConfig.from_pretrained(source, **hub_kwargs)
    kind = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else object
    if not issubclass(kind, RecommenderModel):
        raise ConfigurationError(
            f"{str(source)!r} holds a model of the type {config.model_type!r}, which is no recommender. Your own kind "
            "is registered by AutoConfig.register and AutoModel.register."
        )
    return kind


def _check_sizes(config: PreTrainedConfig) -> None:
    """Raise for a configuration that no model can be built by."""
    for name in ("num_items", "max_length"):
        if not hasattr(config, name):
            raise ConfigurationError(f"{type(config).__name__} has no {name}, which every recommender needs.")
    for name in ("num_items", "hidden_size", "item_dim", "max_length"):
        if (size := getattr(config, name, 1)) < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {size}.")
    if not 0 <= (dropout := getattr(config, "dropout", 0.0)) < 1:
        raise ConfigurationError(f"dropout must be in [0, 1), got {dropout}.")


def _best(scores: torch.Tensor, k: int) -> Iterator[tuple[list[int], list[float]]]:
    """Internal ids and scores of each row's `k` best items; fewer where others are left out, by a score of -inf."""
    values, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    for row_values, row_indices in zip(values, indices, strict=True):
        kept = row_values.isfinite()
        yield row_indices[kept].tolist(), row_values[kept].tolist()


def _id_list(values, name: str) -> list:
    """`list(values)`, but not of a text, which would become a list of its letters."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise DataError(f"{name} must be a list, got {values!r}: one item is a list of one, ['B00001'].")
    return list(values)


def hub_arguments(kwargs: dict) -> dict:
    """Those of `from_pretrained`'s arguments that say where files come from."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


def check_length(item_ids: torch.LongTensor, max_length: int) -> None:
    """Raise where a batch is wider than the model can read."""
    if item_ids.shape[1] > max_length:
        raise ConfigurationError(
            f"The batch holds histories of {item_ids.shape[1]} items and the model reads at most {max_length}: "
            f"collate with SequenceCollator(max_length={max_length}), or build the model with a larger max_length."
        )


def sequence_lengths(item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.LongTensor:
    """Number of items per row, of shape `(B,)`. Padding is on the right and its id is 0."""
    return (item_ids != 0 if attention_mask is None else attention_mask).sum(dim=1)


def supervised(hidden: torch.Tensor, labels: torch.LongTensor, item_matrix: torch.Tensor):
    """Pack the supervised positions: `(hidden (P, d), item_matrix, labels (P,))`, as the loss takes them."""
    mask = labels != -100
    return hidden[mask], item_matrix, labels[mask]
