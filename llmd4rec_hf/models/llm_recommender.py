# SPDX-License-Identifier: Apache-2.0
"""A language model as a recommender: items enter as soft tokens, an item head scores the whole catalogue."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..errors import ConfigurationError
from .item_text import encode_texts
from .recommender import WEIGHTS_NAME, RecommenderModel, hub_arguments, sequence_lengths


ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
BACKBONE_PREFIX = "backbone."
DEFAULT_PROMPT = "A user chose these items, oldest first: {history} The next item is"
SUPERVISION_MODES = ("all_positions", "last_position")


class LLMRecommenderConfig(PreTrainedConfig):
    """
    Configuration of [`LLMRecommender`]. Usually made by [`LLMRecommender.from_backbone`].

    Args:
        num_items (`int`): number of items N; ids are 1..N and 0 is padding.
        item_dim (`int`, *optional*, defaults to 64): width of the item vectors that a CRM injects.
        max_length (`int`, *optional*, defaults to 50): longest history the model reads, in items.
        supervision (`str`, *optional*, defaults to `"all_positions"`): where hidden states are read.
            `"all_positions"`: at each item token, one forward pass per user. `"last_position"`: after the prompt's
            suffix, one forward pass per prefix of the history, as E4SRec does.
        prefix_ids (`list[int]`, *optional*): tokens of the prompt before the history.
        suffix_ids (`list[int]`, *optional*): tokens of the prompt after the history; read in `"last_position"` only.
        item_text (`bool`, *optional*, defaults to `False`): whether title features join soft tokens and item head.
        dropout (`float`, *optional*, defaults to 0.0): dropout of soft tokens and of hidden states before the head.
        backbone_name_or_path (`str`, *optional*): where the base weights are.
        backbone_config (`dict`, *optional*): the backbone's own configuration.
    """

    model_type = "llmd4rec-llm"
    # Declared, because `max_length` would else be taken for a setting of text generation.
    max_length: int = 50

    def __init__(
        self,
        num_items: int = 1,
        item_dim: int = 64,
        max_length: int = 50,
        supervision: str = "all_positions",
        prefix_ids: list[int] | None = None,
        suffix_ids: list[int] | None = None,
        item_text: bool = False,
        dropout: float = 0.0,
        backbone_name_or_path: str = "",
        backbone_config: dict | None = None,
        **kwargs,
    ):
        if supervision not in SUPERVISION_MODES:
            raise ConfigurationError(
                f"supervision must be one of {', '.join(SUPERVISION_MODES)}, got {supervision!r}."
            )
        self.num_items = num_items
        self.item_dim = item_dim
        self.max_length = max_length
        self.supervision = supervision
        self.prefix_ids = list(prefix_ids or [])
        self.suffix_ids = list(suffix_ids or [])
        self.item_text = item_text
        self.dropout = dropout
        self.backbone_name_or_path = backbone_name_or_path
        # A plain dict, never the backbone's own object: a shared one would have its attention implementation reset by
        # this model's constructor, and the backbone would silently stop being causal.
        self.backbone_config = dict(backbone_config or {})
        super().__init__(**kwargs)


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
        backbone = backbone or AutoModel.from_config(AutoConfig.for_model(**config.backbone_config))
        width = backbone.config.hidden_size
        self.backbone = backbone
        self.dropout = nn.Dropout(config.dropout)
        self.input_projection = nn.Linear(config.item_dim, width)
        self.item_head = nn.Linear(width, config.num_items + 1, bias=False)
        self.register_buffer("item_vectors", torch.zeros(config.num_items + 1, config.item_dim))
        if config.item_text:
            self.input_text_projection = nn.Linear(width, width, bias=False)
            self.head_text_projection = nn.Linear(width, width, bias=False)
            self.register_buffer("item_text_features", torch.zeros(config.num_items + 1, width))
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # Soft tokens start at the size of the backbone's own token embeddings, scores near zero.
        width = self.item_head.in_features
        if module is self.item_head:
            nn.init.normal_(module.weight, std=0.02)
        elif module is self.input_projection:
            nn.init.normal_(
                module.weight, std=_root_mean_square(self.token_embedding.weight) * module.in_features**-0.5
            )
            nn.init.zeros_(module.bias)
        elif self.config.item_text and module is self.input_text_projection:
            nn.init.normal_(module.weight, std=_root_mean_square(self.token_embedding.weight) * width**-0.5)
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
        prompt: str = DEFAULT_PROMPT,
        supervision: str = "all_positions",
        item_texts: Sequence[str] | None = None,
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
            prompt (`str`, *optional*): text around `{history}`.
            supervision (`str`, *optional*, defaults to `"all_positions"`): see [`LLMRecommenderConfig`].
            item_texts (`Sequence[str]`, *optional*): the N items' titles, in the order of their ids. Turns item
                text on.
            peft_config ([`~peft.PeftConfig`], *optional*): adapter of the backbone. Without one the whole backbone is
                trained.
            quantization_config (*optional*): e.g. a `BitsAndBytesConfig`; asks for a `peft_config`.
            max_length (`int`, *optional*, defaults to 50): longest history in items.
            dropout (`float`, *optional*, defaults to 0.0): see [`LLMRecommenderConfig`].
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the backbone's weights.
            trust_remote_code (`bool`, *optional*, defaults to `False`): run code from the model's repository.
            backbone_kwargs: further arguments of `AutoModel.from_pretrained`, e.g. `device_map`.

        Raises:
            ConfigurationError: a backbone that cannot be loaded or is not causal, a prompt without `{history}`, a
                number of texts other than `num_items`, a quantised backbone without adapter.
        """
        if quantization_config is not None and peft_config is None:
            raise ConfigurationError("Quantised weights cannot be trained: give a peft_config, e.g. LoraConfig().")
        if item_texts is not None and len(item_texts) != num_items:
            raise ConfigurationError(f"item_texts holds {len(item_texts)} texts for {num_items} items.")
        _check_bare(backbone)
        name = backbone if isinstance(backbone, (str, os.PathLike)) else backbone.config._name_or_path
        if tokenizer is None:
            tokenizer = _load_tokenizer(name, trust_remote_code)
        if not isinstance(backbone, PreTrainedModel):
            backbone = _load_backbone(name, dtype, quantization_config, trust_remote_code, backbone_kwargs)
        _check_causal(backbone)
        prefix_ids, suffix_ids = _split_prompt(prompt, tokenizer)
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
            backbone_config=backbone.config.to_dict(),
        )
        model = cls(config, backbone)
        model.tokenizer = tokenizer
        if item_texts is not None:
            model.item_text_features[1:] = encode_texts(backbone, tokenizer, item_texts)
        if peft_config is not None:
            model._add_adapter(peft_config)
        return model

    def _add_adapter(self, peft_config):
        # After the constructor, never before it: `post_init` would draw the adapter's weights anew.
        from peft import get_peft_model

        self.backbone = get_peft_model(self.backbone, peft_config)

    @property
    def has_adapter(self) -> bool:
        """Whether the backbone is frozen and carries a PEFT adapter."""
        return hasattr(self.backbone, "peft_config")

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
        self.item_vectors.copy_(vectors / _root_mean_square(vectors[1:]).clamp_min(1e-12))
        self.item_vectors[0] = 0

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
        cache = self.backbone(inputs_embeds=prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(tokens.shape[0])
        return self.backbone(inputs_embeds=tokens, past_key_values=cache, use_cache=True).last_hidden_state

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

    # --- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        """
        Save the adapter in PEFT's own files (it loads on the bare backbone too) and everything else, never the base
        weights, in `model.safetensors`; without an adapter the trained backbone is part of it.
        """
        state_dict = self.portable_state(state_dict)
        if self.has_adapter:
            if is_main_process:
                self._save_adapter(save_directory, state_dict)
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith(BACKBONE_PREFIX)}
        if self.tokenizer is not None and is_main_process:
            self.tokenizer.save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)

    def portable_state(self, state_dict: dict | None = None) -> dict[str, torch.Tensor]:
        """All but frozen base weights: with an adapter, its tensors (under PEFT's own names) for the backbone."""
        state_dict = super().portable_state(state_dict)
        if not self.has_adapter:
            return state_dict
        from peft import get_peft_model_state_dict

        backbone, own = {}, {}
        for name, value in state_dict.items():
            if name.startswith(BACKBONE_PREFIX):
                backbone[name.removeprefix(BACKBONE_PREFIX)] = value
            else:
                own[name] = value
        adapter = get_peft_model_state_dict(self.backbone, state_dict=backbone)
        return own | {BACKBONE_PREFIX + name: value for name, value in adapter.items()}

    def _save_adapter(self, directory, portable_state):
        # Not PeftModel.save_pretrained: it would also write a model card that claims the whole repository for PEFT.
        os.makedirs(directory, exist_ok=True)
        tensors = {
            name.removeprefix(BACKBONE_PREFIX): value.contiguous()
            for name, value in portable_state.items()
            if name.startswith(BACKBONE_PREFIX)
        }
        save_file(tensors, os.path.join(directory, ADAPTER_WEIGHTS_NAME), metadata={"format": "pt"})
        peft_config = copy.copy(self.backbone.peft_config["default"])
        peft_config.inference_mode = True
        peft_config.save_pretrained(directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        config: LLMRecommenderConfig | None = None,
        backbone: PreTrainedModel | None = None,
        quantization_config=None,
        dtype: torch.dtype | str = torch.float32,
        trust_remote_code: bool = False,
        is_trainable: bool = False,
        **kwargs,
    ) -> LLMRecommender:
        """
        Load a recommender that [`~LLMRecommender.save_pretrained`] wrote, from a folder or the Hub.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id.
            config ([`LLMRecommenderConfig`], *optional*): read from the folder by default.
            backbone ([`~transformers.PreTrainedModel`], *optional*): the base model, if it is loaded already or is no
                longer where the configuration says.
            quantization_config (*optional*): load the base in 8 or 4 bits.
            dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`): of the base weights.
            trust_remote_code (`bool`, *optional*, defaults to `False`): run code from the base model's repository.
            is_trainable (`bool`, *optional*, defaults to `False`): load the adapter for further training.
            kwargs: where files come from (`revision`, `token`, `cache_dir`, `local_files_only`, ...); others go to
                `AutoModel.from_pretrained` for the base.
        """
        source, hub_kwargs = str(pretrained_model_name_or_path), hub_arguments(kwargs)
        # `AutoModel` takes the adapter in the folder for one of its own and hands its findings on.
        backbone_kwargs = {
            name: value for name, value in kwargs.items() if name not in hub_kwargs and name != "adapter_kwargs"
        }
        config = config or cls.config_class.from_pretrained(source, **hub_kwargs)
        adapter = cached_file(source, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if backbone is None and adapter is None:
            backbone = AutoModel.from_config(AutoConfig.for_model(**config.backbone_config), dtype=dtype)
        elif backbone is None:
            name = config.backbone_name_or_path
            backbone = _load_backbone(name, dtype, quantization_config, trust_remote_code, backbone_kwargs)
        model = cls(config, backbone)
        if adapter is not None:
            from peft import PeftModel

            folder = os.path.dirname(cached_file(source, ADAPTER_WEIGHTS_NAME, **hub_kwargs))
            model.backbone = PeftModel.from_pretrained(model.backbone, folder, is_trainable=is_trainable)
        model._load_own_weights(cached_file(source, WEIGHTS_NAME, **hub_kwargs))
        model._load_vocabulary(source, **hub_kwargs)
        model.tokenizer = _load_tokenizer(source, trust_remote_code, **hub_kwargs)
        return model.eval()

    def load_weights(self, directory: str | os.PathLike) -> None:
        if self.has_adapter:
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.backbone, load_file(os.path.join(directory, ADAPTER_WEIGHTS_NAME)))
        self._load_own_weights(os.path.join(directory, WEIGHTS_NAME))

    def _load_own_weights(self, path: str) -> None:
        """Load what `model.safetensors` holds; nothing of it may be missing or left over."""
        outcome = self.load_state_dict(load_file(path), strict=False)
        missing = [
            name for name in outcome.missing_keys if not (self.has_adapter and name.startswith(BACKBONE_PREFIX))
        ]
        if missing or outcome.unexpected_keys:
            raise ConfigurationError(
                f"{path} does not fit this model: missing {missing[:3]}, unexpected {outcome.unexpected_keys[:3]}."
            )


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    return values.float().square().mean().sqrt()


def _load_tokenizer(name, trust_remote_code: bool, **hub_kwargs) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise ConfigurationError(_cannot_load("tokenizer", name, error)) from error


def _load_backbone(name, dtype, quantization_config, trust_remote_code: bool, backbone_kwargs) -> PreTrainedModel:
    """Load a decoder; an encoder that can act as a decoder is told to."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        backbone = AutoModel.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config,
            trust_remote_code=trust_remote_code,
            **backbone_kwargs,
        )
    except (OSError, ValueError) as error:
        raise ConfigurationError(_cannot_load("language model", name, error)) from error
    if quantization_config is not None:
        from peft import prepare_model_for_kbit_training

        backbone = prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
        for module in backbone.modules():
            # bitsandbytes repacks 4-bit weights in the first evaluation on such CPUs, into a form that has no
            # gradient and loses precision: training after an evaluation would fail.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return backbone


def _cannot_load(what: str, name, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0]
    return f"Cannot load the {what} {str(name)!r}: give a folder or a Hub id of a transformers model ({first_line})"


def _check_bare(backbone) -> None:
    if isinstance(backbone, (str, os.PathLike)):
        return
    if not isinstance(backbone, PreTrainedModel) or backbone.base_model is not backbone:
        raise ConfigurationError(
            f"{type(backbone).__name__} is not a bare backbone: give a folder, a Hub id, or a loaded model without head "
            "(its `.base_model`) and without adapter, which goes into `peft_config`."
        )


def _check_causal(backbone: PreTrainedModel) -> None:
    """Raise unless early states are blind to later tokens: else training would read the answers."""
    vocabulary_size = backbone.get_input_embeddings().num_embeddings
    tokens = torch.arange(1, 6, device=backbone.device).remainder(vocabulary_size)[None]
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % vocabulary_size
    was_training = backbone.training
    backbone.eval()
    with torch.no_grad():
        first, second = (backbone(input_ids=ids).last_hidden_state[0, :-1].float() for ids in (tokens, changed))
    backbone.train(was_training)
    if not torch.allclose(first, second, atol=1e-3, rtol=1e-3):
        raise ConfigurationError(
            f"{type(backbone).__name__} is not causal: a later token changes earlier states. Give a decoder, or an "
            "encoder whose configuration has `is_decoder`."
        )


def _split_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids before and after `{history}`; special tokens that open a text stay, those that close it do not."""
    before, marker, after = prompt.partition("{history}")
    if not marker:
        raise ConfigurationError(f"The prompt must contain '{{history}}', where the items go; got {prompt!r}.")
    prefix = tokenizer(before.rstrip())["input_ids"]
    while prefix and prefix[-1] in (tokenizer.sep_token_id, tokenizer.eos_token_id):
        prefix.pop()
    suffix = tokenizer(after.rstrip(), add_special_tokens=False)["input_ids"] if after.strip() else []
    return prefix, suffix
