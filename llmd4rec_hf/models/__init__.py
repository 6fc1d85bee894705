# SPDX-License-Identifier: Apache-2.0
"""Recommenders: one protocol, conventional models and the LLM."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel

from .ensemble import RecommenderEnsemble
from .gru4rec import GRU4RecConfig, GRU4RecModel
from .llm_config import LLMRecommenderConfig
from .llm_recommender import LLMRecommender
from .recbole import RecBoleSASRecConfig, RecBoleSASRecModel
from .recommendations import Recommendations
from .recommender import RecommenderModel, RecommenderOutput
from .sasrec import SASRecConfig, SASRecModel
from .tiny_llm import build_tiny_llm


for _model in (GRU4RecModel, LLMRecommender, RecBoleSASRecModel, SASRecModel):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModel.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "GRU4RecConfig",
    "GRU4RecModel",
    "LLMRecommender",
    "LLMRecommenderConfig",
    "RecBoleSASRecConfig",
    "RecBoleSASRecModel",
    "Recommendations",
    "RecommenderEnsemble",
    "RecommenderModel",
    "RecommenderOutput",
    "SASRecConfig",
    "SASRecModel",
    "build_tiny_llm",
]
