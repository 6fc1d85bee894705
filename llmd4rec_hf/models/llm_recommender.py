# SPDX-License-Identifier: Apache-2.0
"""A language model as a recommender: items enter as soft tokens, an item head scores the whole catalogue."""

from __future__ import annotations

import os
from collections.abc import Sequence
from inspect import signature
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigurationError
from . import adapters
from . import backbone as base
from .dropout import Dropout, use_cheap_masks
from .item_text import average_of_alike, encode_more_texts, encode_texts, principal_item_vectors
from .llm_config import LLMRecommenderConfig
from .prompt import DEFAULT_PROMPT, split_prompt
from .recommender import RecommenderModel, check_length, sequence_lengths
from .weights import find_file, hub_arguments, load_stored_weights, loading, split_state


BACKBONE_PREFIX = "backbone."


class LLMRecommender(RecommenderModel):
    """
    E4SRec's layout, as LLMD4Rec uses it: each item of the history enters a decoder as one soft token
    `input_projection(item_vector)` after a text prompt, and `item_head` replaces the language-model head. The item
    vectors come from a CRM through [`~LLMRecommender.set_item_vectors`] and are not trained here.

    With item text each title, encoded once by the backbone, is added to its soft token and to its row of the item
    head, each through a projection; without it the layout is exactly the paper's.

    A pass reads prompt prefix, item tokens and suffix without a gap, and padding comes last, so that a score never
    depends on the other histories of its batch.

    Args:
        config ([`LLMRecommenderConfig`]): the configuration.
        backbone ([`~transformers.PreTrainedModel`], *optional*): the decoder without its language-model head. Built
            with random weights from `config.backbone_config` by default.
    """

    config_class = LLMRecommenderConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: LLMRecommenderConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        backbone = backbone or base.build_backbone(config.backbone_config, "auto")
        width, rows = base.hidden_width(backbone), config.num_items + 1
        # Where the backbone is: a quantised one cannot be moved. In full precision, whatever the backbone has.
        place = {"device": backbone.device, "dtype": torch.float32}
        self.backbone = backbone
        use_cheap_masks(backbone)
        self.dropout = Dropout(config.dropout)
        self.input_projection = nn.Linear(config.item_dim, width, **place)
        self.item_head = nn.Linear(width, rows, bias=False, **place)
        self.register_buffer("item_vectors", torch.zeros(rows, config.item_dim, **place))
        if config.item_text:
            self.input_text_projection = nn.Linear(width, width, bias=False, **place)
            self.head_text_projection = nn.Linear(width, width, bias=False, **place)
            self.register_buffer("item_text_features", torch.zeros(rows, width, **place))
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # Soft tokens start at the size of the backbone's own token embeddings, scores near zero.
        width = self.item_head.in_features
        if module is self.item_head:
            nn.init.normal_(module.weight, std=0.02)
        elif module is self.input_projection:
            nn.init.normal_(module.weight, std=base.embedding_scale(self.backbone) * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif self.config.item_text and module is self.input_text_projection:
            nn.init.normal_(module.weight, std=base.embedding_scale(self.backbone) * width**-0.5)
        elif self.config.item_text and module is self.head_text_projection:
            nn.init.normal_(module.weight, std=0.02 * width**-0.5)

    # --- construction --------------------------------------------------------------------------------------------

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        num_items: int,
        item_dim: int = 64,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt: str | Sequence[dict[str, str]] = DEFAULT_PROMPT,
        supervision: str = "all_positions",
        item_texts: Sequence[str] | None = None,
        item_text_cache: str | os.PathLike | None = None,
        peft_config=None,
        quantization_config=None,
        max_length: int = 50,
        dropout: float = 0.0,
        dtype: torch.dtype | str = torch.float32,
        trust_remote_code: bool = False,
        **backbone_kwargs,
    ) -> LLMRecommender:
        """
        Build a recommender on a pretrained decoder. Encoders such as BERT are made causal.

        Args:
            backbone (`str` or [`~transformers.PreTrainedModel`]): folder or Hub id for `AutoModel`, or a loaded model
                without its language-model head.
            num_items (`int`): number of items N.
            item_dim (`int`, *optional*, defaults to 64): width of the CRM's item vectors.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the backbone's tokenizer; loaded from
                `backbone` by default.
            prompt (`str` or `Sequence[dict]`, *optional*): text around `{history}`, or the messages of a chat, one of
                which holds `{history}`, for tokenizers with a chat template.
            supervision (`str`, *optional*, defaults to `"all_positions"`): see [`LLMRecommenderConfig`].
            item_texts (`Sequence[str]`, *optional*): the N items' titles, in the order of their ids. Turns item
                text on.
            item_text_cache (`str`, *optional*): folder in which the encoded titles are kept, by content hash of
                backbone, tokenizer and titles, for the next model on the same three.
            peft_config ([`~peft.PeftConfig`], *optional*): adapter of the backbone; LoRA without `target_modules` gets
                all linear layers. Without an adapter the whole backbone is trained.
            quantization_config (*optional*): e.g. a `BitsAndBytesConfig`; asks for a `peft_config`.
            max_length (`int`, *optional*, defaults to 50): longest history in items.
            dropout (`float`, *optional*, defaults to 0.0): see [`LLMRecommenderConfig`].
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the backbone's weights.
            trust_remote_code (`bool`, *optional*, defaults to `False`): run code from the model's repository.
            backbone_kwargs: where files come from (`revision`, `token`, `local_files_only`, ...), and further
                arguments of `AutoModel.from_pretrained`, e.g. `device_map` (a quantised backbone goes to the
                process's own GPU by default).

        Raises:
            ConfigurationError: a backbone that cannot be loaded or is not causal, a prompt without `{history}`, a
                number of texts other than `num_items`, a quantised backbone without adapter.
        """
        if item_texts is not None and len(item_texts) != num_items:
            raise ConfigurationError(f"item_texts holds {len(item_texts)} texts for {num_items} items.")
        base.check_bare(backbone)
        if peft_config is None and (quantization_config is not None or getattr(backbone, "is_quantized", False)):
            raise ConfigurationError("Quantised weights cannot be trained: give a peft_config, e.g. LoraConfig().")
        name = backbone if isinstance(backbone, (str, os.PathLike)) else backbone.config._name_or_path
        dtype = backbone_kwargs.pop("torch_dtype", dtype)  # its older name
        hub_kwargs = hub_arguments(backbone_kwargs)
        if tokenizer is None:
            tokenizer = base.load_tokenizer(name, trust_remote_code=trust_remote_code, **hub_kwargs)
        if not isinstance(backbone, PreTrainedModel):
            backbone = base.load_backbone(name, dtype, quantization_config, trust_remote_code, **backbone_kwargs)
        backbone = base.ready_for_training(backbone)
        base.check_causal(backbone)
        prefix_ids, suffix_ids = split_prompt(prompt, tokenizer)
        base.check_room(backbone, len(prefix_ids) + max_length + len(suffix_ids))
        config = LLMRecommenderConfig(
            num_items=num_items,
            item_dim=item_dim,
            max_length=max_length,
            supervision=supervision,
            prefix_ids=prefix_ids,
            suffix_ids=suffix_ids,
            item_text=item_texts is not None,
            dropout=dropout,
            backbone_name_or_path=str(name),
            backbone_revision=backbone_kwargs.get("revision"),
            backbone_subfolder=backbone_kwargs.get("subfolder"),
            backbone_config=base.plain_config(backbone),
        )
        model = cls(config, backbone)
        model.tokenizer = tokenizer
        if item_texts is not None:
            model.item_text_features[1:] = encode_texts(backbone, tokenizer, item_texts, item_text_cache)
        if peft_config is not None:
            # After the constructor, never before it: `post_init` would draw the adapter's weights anew.
            model.backbone = adapters.add_adapter(backbone, peft_config)
        return model

    @property
    def has_adapter(self) -> bool:
        """Whether the backbone is frozen and carries a PEFT adapter."""
        return hasattr(self.backbone, "peft_config")

    def added_settings(self) -> dict:
        return adapters.added_settings(self.backbone)

    @property
    def tells_items_apart(self) -> bool:
        """Whether a history's soft tokens say which items it holds: by titles, or by item vectors that were set."""
        return self.config.item_text or bool(self.item_vectors.any())

    @property
    def token_embedding(self) -> nn.Embedding:
        """The backbone's token embeddings."""
        return self.backbone.get_input_embeddings()

    @torch.no_grad()
    def set_item_vectors(self, vectors: torch.Tensor) -> None:
        """
        Inject a CRM's item vectors (the paper's ID-embedding injection; again at each round, its refresh).

        They are brought to unit root mean square, so that `input_projection`, which was fitted to the table before,
        goes on to see inputs of the same size.

        Args:
            vectors (`torch.Tensor` of shape `(N + 1, item_dim)`): the CRM's item matrix; row 0 is padding.
        """
        if vectors.shape != self.item_vectors.shape:
            raise ConfigurationError(
                f"The item vectors are of shape {tuple(vectors.shape)} and this model takes "
                f"{tuple(self.item_vectors.shape)}: build it with item_dim={vectors.shape[1]} over the same items."
            )
        vectors = vectors.detach().to(self.item_vectors)
        self.item_vectors.copy_(vectors / vectors[1:].float().square().mean().sqrt().clamp_min(1e-12))
        self.item_vectors[0] = 0

    def title_vectors(self, width: int | None = None) -> torch.Tensor:
        """
        Item vectors that hold what the titles say, for a CRM to begin with: principal components of the title features
        as the backbone reads them. Nothing that this model was trained for is in them.

        Args:
            width (`int`, *optional*): of the CRM's item vectors; `item_dim` by default.

        Returns:
            `torch.Tensor` of shape `(N + 1, width)`; row 0, padding, is zero.

        Raises:
            ConfigurationError: a model without item text.

        Example:

        ```python
        >>> crm.set_item_vectors(llm.title_vectors())
        ```
        """
        if not self.config.item_text:
            raise ConfigurationError("This model knows no titles: build it with item_texts.")
        return principal_item_vectors(self.item_text_features[1:], width or self.config.item_dim).to(self.device)

    @torch.no_grad()
    def add_items(self, item_ids: Sequence, texts: Sequence[str]) -> None:
        """
        Add items that no training history holds, so that they can be ranked and be part of histories.

        Their title features are read as those of the known items were. What training gives to each item alone, the
        row of the item head and the CRM's vector, is the average of the known items' with the most similar titles. The
        internal ids of the known items stay, and so do their scores. It is meant for a trained model: a CRM, a teacher
        cache or a data set over the smaller catalogue no longer fits.

        Args:
            item_ids (`Sequence`): external ids that the vocabulary lacks.
            texts (`Sequence[str]`): their titles.

        Raises:
            ConfigurationError: a model without item text or vocabulary.
            DataError: an id that is known already, or not one text per id.

        Example:

        ```python
        >>> llm.add_items(["B9"], ["Matte lipstick, coral"])
        >>> llm.recommend([["B1", "B2"]], candidates=["B9", "B3"])
        ```
        """
        if not self.config.item_text or self.vocabulary is None:
            raise ConfigurationError(
                "New items are placed by their titles: build the model with item_texts, and set its vocabulary."
            )
        vocabulary = self.vocabulary.add(item_ids, texts)
        features, vectors, head_rows = self._place_titles(texts)
        features = features.to(self.item_text_features)
        self.item_text_features = torch.cat([self.item_text_features, features])
        self.item_vectors = torch.cat([self.item_vectors, vectors])
        self.item_head.weight = nn.Parameter(torch.cat([self.item_head.weight, head_rows]))
        self.item_head.out_features = len(vocabulary) + 1
        self.config.num_items = len(vocabulary)
        self.vocabulary = vocabulary

    def _place_titles(self, texts: Sequence[str]) -> list[torch.Tensor]:
        """Features `(M, width)`, item vectors `(M, item_dim)` and head rows `(M, width)` of new titles."""
        known = self.item_text_features[1:]
        tables = [self.item_vectors[1:], self.item_head.weight[1:]]
        if self.has_adapter:
            with self.backbone.disable_adapter():
                features = encode_more_texts(
                    self.backbone.get_base_model(), self.tokenizer, texts, self.vocabulary.texts, known
                )
            return [features, *average_of_alike(features, known, tables)]
        # A backbone that was trained as a whole reads titles otherwise than it did: all are read again, to find those
        # that are alike, and new features are averages too.
        again = encode_texts(self.backbone, self.tokenizer, [*self.vocabulary.texts, *texts])
        return average_of_alike(again[len(known) :], again[: len(known)], [known, *tables])

    def merge_and_unload(self) -> LLMRecommender:
        """
        Add the adapter to the backbone's weights and drop it; afterwards the model is saved whole, and needs neither
        PEFT nor the base model. A quantised backbone becomes a floating-point one. Some adapters cannot be merged.
        """
        if self.has_adapter:
            # Trained as a whole from here on, as one that never had an adapter.
            self.backbone = adapters.merge_adapter(self.backbone).requires_grad_(True)
        return self

    # --- computation ---------------------------------------------------------------------------------------------

    def item_matrix(self) -> torch.Tensor:
        if not self.config.item_text:
            return self.item_head.weight
        return self.item_head.weight + self.head_text_projection(self.item_text_features)

    def encode(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        tokens = self._soft_tokens(item_ids)
        if self.config.supervision == "all_positions":
            return self._read(self._run_after_prefix(tokens))
        lengths = sequence_lengths(item_ids, attention_mask)
        rows, positions = (torch.arange(item_ids.shape[1], device=item_ids.device) < lengths[:, None]).nonzero().T
        hidden = self._read_after_suffix(tokens[rows], positions + 1)
        return hidden.new_zeros(*item_ids.shape, hidden.shape[-1]).index_put((rows, positions), hidden)

    def encode_last(self, item_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None) -> torch.Tensor:
        if self.config.supervision == "all_positions":
            return super().encode_last(item_ids, attention_mask)
        return self._read_after_suffix(self._soft_tokens(item_ids), sequence_lengths(item_ids, attention_mask))

    def _soft_tokens(self, item_ids: torch.LongTensor) -> torch.Tensor:
        check_length(item_ids, self.config.max_length)
        tokens = self.input_projection(self.item_vectors[item_ids])
        if self.config.item_text:
            tokens = tokens + self.input_text_projection(self.item_text_features[item_ids])
        return self.dropout(tokens).to(self.backbone.dtype)

    def _prompt(self, ids: list[int]) -> torch.Tensor:
        """Embeddings of prompt tokens, of shape `(1, len(ids), width)`."""
        return self.token_embedding(torch.tensor([ids], dtype=torch.long, device=self.device)).to(self.backbone.dtype)

    def _run_after_prefix(self, tokens: torch.Tensor) -> torch.Tensor:
        """Backbone states at `tokens (B, T, width)`, which follow the prompt prefix."""
        if not self.config.prefix_ids:
            return self.backbone(inputs_embeds=tokens, use_cache=False).last_hidden_state
        prefix = self._prompt(self.config.prefix_ids)
        if self.training and self._checkpoints_activations():
            # Recomputed layers would append to the cache a second time.
            inputs = torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)
            return self.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, prefix.shape[1] :]
        # The prefix is the same for every row: computed once, its keys and values are repeated over the batch.
        outputs = self.backbone(inputs_embeds=prefix, use_cache=True)
        name = "cache" if "cache" in outputs else "past_key_values"  # before transformers 5.24
        outputs[name].batch_repeat_interleave(tokens.shape[0])
        return self.backbone(inputs_embeds=tokens, **{name: outputs[name]}, use_cache=True).last_hidden_state

    def _checkpoints_activations(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.modules())

    def _read_after_suffix(self, tokens: torch.Tensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Hidden state `(B, width)` at the end of prefix + the first `lengths` soft tokens + suffix."""
        suffix = self._prompt(self.config.suffix_ids)[0]
        batch, _, width = tokens.shape
        rows = torch.arange(batch, device=tokens.device)
        offsets = lengths[:, None] + torch.arange(len(suffix), device=tokens.device)
        # The suffix overwrites what comes after each row's items, so that padding stays last.
        inputs = torch.cat([tokens, tokens.new_zeros(batch, len(suffix), width)], dim=1)
        inputs = inputs.index_put((rows[:, None], offsets), suffix.expand(batch, -1, -1))
        return self._read(self._run_after_prefix(inputs)[rows, lengths + len(suffix) - 1])

    def _read(self, states: torch.Tensor) -> torch.Tensor:
        return self.dropout(states.to(self.item_head.weight.dtype))

    def add_adapter(self, *args, **kwargs) -> None:
        """Refused: transformers would freeze head and projections, and save the adapter alone."""
        raise ConfigurationError("An adapter goes into the backbone: LLMRecommender.from_backbone(peft_config=...).")

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """
        Save the adapter in PEFT's own files (it loads on the bare backbone too) and everything else, never the base
        weights, in `model.safetensors`; without an adapter the trained backbone is part of it.
        """
        state_dict = self.portable_state(state_dict)
        if self.has_adapter:
            state_dict, adapter = split_state(state_dict, BACKBONE_PREFIX)
            if is_main_process:
                adapters.save_adapter(self.backbone, adapter, save_directory)
        elif is_main_process:
            # Of this model before its adapter was merged: they would be taken for its own.
            for name in (adapters.ADAPTER_CONFIG_NAME, adapters.ADAPTER_WEIGHTS_NAME):
                Path(save_directory, name).unlink(missing_ok=True)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def save_companions(self, save_directory: str | os.PathLike) -> None:
        super().save_companions(save_directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def portable_state(self, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """All but frozen base weights: with an adapter, its tensors (under PEFT's own names) for the backbone."""
        state_dict = super().portable_state(state_dict)
        if not self.has_adapter:
            return state_dict
        own, backbone = split_state(state_dict, BACKBONE_PREFIX)
        adapter = adapters.adapter_state(self.backbone, backbone)
        return own | {BACKBONE_PREFIX + name: value for name, value in adapter.items()}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        config: LLMRecommenderConfig | None = None,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        quantization_config=None,
        dtype: torch.dtype | str = torch.float32,
        trust_remote_code: bool = False,
        is_trainable: bool = False,
        **kwargs,
    ) -> LLMRecommender:
        """
        Load a recommender that [`~LLMRecommender.save_pretrained`] wrote, from a folder or the Hub.

        `AutoModel` does the same for a folder (transformers 5.4 or later). Given the Hub id of a repository with an
        adapter it does what transformers does for all of these: it loads the base model with the adapter, and leaves
        out the rest.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id.
            config ([`LLMRecommenderConfig`], *optional*): read from the folder by default.
            backbone (`str` or [`~transformers.PreTrainedModel`], *optional*): the base model, if it is loaded already
                (an adapter is put into it in place, so it serves one recommender), or its folder or Hub id, if it is
                no longer where the configuration says.
            quantization_config (*optional*): load the base in 8 or 4 bits.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the base weights.
            trust_remote_code (`bool`, *optional*, defaults to `False`): run code from the base model's repository.
            is_trainable (`bool`, *optional*, defaults to `False`): load the adapter for further training.
            kwargs: settings to change, e.g. `dropout`; where files come from (`revision`, `token`, `cache_dir`,
                `local_files_only`, ...; all but `revision` and `subfolder` go for the base as well); others, e.g.
                `attn_implementation`, go to `AutoModel.from_pretrained` for the base.

        Raises:
            ConfigurationError: no recommender there, a base model that is not found or does not fit, files that do not
                fit or are later than this release, a `quantization_config` for one that was saved whole.
        """
        source, hub_kwargs = str(pretrained_model_name_or_path), hub_arguments(kwargs)
        dtype = kwargs.pop("torch_dtype", dtype)  # its older name
        if config is None:
            known = signature(cls.config_class.__init__).parameters.keys() & kwargs.keys()
            settings = {name: kwargs.pop(name) for name in known}
            with loading(source):
                config = cls.config_class.from_pretrained(source, **hub_kwargs, **settings)
        if not config.backbone_config:
            raise ConfigurationError(f"{source} holds no LLM recommender: RecommenderModel loads any kind.")
        adapter = find_file(source, adapters.ADAPTER_CONFIG_NAME, **hub_kwargs)
        if adapter is None and quantization_config is not None:
            raise ConfigurationError(
                f"{source} was saved with its whole backbone, without an adapter: it cannot be loaded in fewer bits."
            )
        # `revision` and `subfolder` are the recommender's; the last two are what `AutoModel` hands on.
        own = ("revision", "subfolder", "adapter_kwargs", "_from_auto")
        options = {key: value for key, value in kwargs.items() if key not in own}
        if isinstance(backbone, PreTrainedModel):
            base.check_bare(backbone)
            base.check_causal(backbone)
        elif adapter is None and backbone is None:
            options = {key: value for key, value in options.items() if key not in hub_kwargs}
            backbone = base.build_backbone(config.backbone_config, dtype, **options)
        else:
            backbone = base.load_base(
                source, config, backbone, dtype, quantization_config, trust_remote_code, **options
            )
        model = cls(config, base.ready_for_training(backbone))
        if adapter is not None:
            model.backbone = adapters.load_adapter(model.backbone, source, is_trainable, **hub_kwargs)
        model._load_own_weights(source, **hub_kwargs)
        model._load_vocabulary(source, **hub_kwargs)
        if find_file(source, "tokenizer_config.json", **hub_kwargs):
            model.tokenizer = base.load_tokenizer(source, trust_remote_code=trust_remote_code, **hub_kwargs)
        return model.eval()

    def load_weights(self, directory: str | os.PathLike) -> None:
        if self.has_adapter:
            adapters.load_adapter_weights(self.backbone, directory)
        self._load_own_weights(directory)

    def _load_own_weights(self, source: str | os.PathLike, **hub_kwargs) -> None:
        """Load all but the adapter and what lies under it."""
        load_stored_weights(self, source, BACKBONE_PREFIX if self.has_adapter else (), **hub_kwargs)
