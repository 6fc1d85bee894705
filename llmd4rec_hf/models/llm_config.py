# SPDX-License-Identifier: Apache-2.0
"""The configuration of the LLM side."""

from __future__ import annotations

from transformers import PreTrainedConfig

from ..errors import ConfigurationError


SUPERVISION_MODES = ("all_positions", "last_position")
FORMAT_VERSION = 1


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
        backbone_revision, backbone_subfolder (`str`, *optional*): which of them, if that was said.
        backbone_config (`dict`, *optional*): the backbone's own configuration.
        format_version (`int`, *optional*, defaults to 1): of the files; later releases read earlier versions.
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
        backbone_revision: str | None = None,
        backbone_subfolder: str | None = None,
        backbone_config: dict | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs,
    ):
        if format_version > FORMAT_VERSION:
            raise ConfigurationError(
                f"This model is in format version {format_version} and this release reads up to {FORMAT_VERSION}: "
                "update llmd4rec_hf."
            )
        self.format_version = FORMAT_VERSION
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
        self.backbone_revision = backbone_revision
        self.backbone_subfolder = backbone_subfolder
        # A plain dict, never the backbone's own object: a shared one would have its attention implementation reset by
        # this model's constructor, and the backbone would silently stop being causal.
        self.backbone_config = dict(backbone_config or {})
        super().__init__(**kwargs)
