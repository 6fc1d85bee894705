# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from transformers import HfArgumentParser, TrainingArguments

from llmd4rec_hf import CRMArguments, CRMTrainer, MutualDistillArguments
from llmd4rec_hf.errors import ConfigurationError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"kl_weight": -0.5}, "kl_weight must not be negative"),
        ({"weighting": "ranks"}, "weighting must be one of"),
        ({"teacher_max_error": -0.01}, "teacher_max_error must not be negative"),
        ({"dropout_with_teacher": 1.0}, r"dropout_with_teacher must be in \[0, 1\), got 1.0"),
        ({"num_sampled_items": 0}, "num_sampled_items must be at least 1, or left out, got 0"),
        ({"rank_base": 2}, "rank_base must be one of"),
        ({"seen_items": "hide"}, "seen_items must be one of"),
        ({"loss_normalization": "mean"}, "loss_normalization must be one of"),
    ],
)
def test_bad_settings_are_named(tmp_path, setting, message):
    with pytest.raises(ConfigurationError, match=message):
        CRMArguments(str(tmp_path), use_cpu=True, **setting)


@pytest.mark.parametrize("arguments_class", [CRMArguments, MutualDistillArguments])
def test_command_line_reads_every_field(arguments_class, tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "True", "--learning_rate", "1e-4", "--kl_weight", "2"]
    words += ["--weighting", "confidence", "--rank_base", "0", "--early_stopping_patience", "3"]
    words += ["--max_positions_per_batch", "4096"]
    (args,) = HfArgumentParser(arguments_class).parse_args_into_dataclasses(words)
    assert args.learning_rate == 1e-4
    assert (args.kl_weight, args.weighting, args.rank_base) == (2.0, "confidence", 0)
    assert (args.early_stopping_patience, args.max_positions_per_batch) == (3, 4096)


def test_no_pinned_memory_without_an_accelerator(tmp_path):
    assert not CRMArguments(str(tmp_path), use_cpu=True).dataloader_pin_memory


@pytest.mark.skipif(
    "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__, reason="transformers knows no strategies"
)
def test_one_choice_of_what_shares_a_batch(tmp_path, make_crm, splits):
    with pytest.raises(ConfigurationError, match="'sequential' and length_bucketing, .* set length_bucketing=False"):
        CRMArguments(str(tmp_path), use_cpu=True, train_sampling_strategy="sequential")
    args = CRMArguments(str(tmp_path), use_cpu=True, train_sampling_strategy="sequential", length_bucketing=False)
    sampler = CRMTrainer(make_crm(), args, splits["train"]).get_train_dataloader().sampler
    assert list(sampler) == list(range(len(splits["train"])))
