# SPDX-License-Identifier: Apache-2.0
"""The one protocol of this package: a hidden state per position, and an item matrix."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from ..data import ItemVocabulary
from ..data.vocabulary import VOCABULARY_FILE
from ..distillation.loss import distillation_loss
from ..errors import ConfigurationError
from .recommend import RecommendationMixin
from .weights import find_file, hash_tensors, hub_arguments, load_stored_weights, loading, remove_weights


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


class RecommenderModel(PreTrainedModel, RecommendationMixin):
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
        load_stored_weights(self, directory)


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
    # Found once: with a mask both would look for them, and wait for a GPU.
    places = (labels.flatten() != -100).nonzero().squeeze(1)
    return hidden.flatten(0, 1)[places], item_matrix, labels.flatten()[places]
