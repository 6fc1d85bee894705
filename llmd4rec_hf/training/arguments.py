# SPDX-License-Identifier: Apache-2.0
"""Training arguments of the two trainers: `TrainingArguments` and what distillation adds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

from transformers import SchedulerType, TrainingArguments

from ..distillation.weighting import WEIGHTINGS
from ..errors import ConfigurationError


SEEN_ITEMS = ("mask", "keep")
NORMALIZATIONS = ("dataset", "batch")


@dataclass
class DistillationSettings:
    """
    What distillation adds to [`~transformers.TrainingArguments`].

    Args:
        temperature (`float`, *optional*, defaults to 2.0): softens both distributions in the KL term.
        kl_weight (`float`, *optional*, defaults to 0.5): weight of KL against cross-entropy.
        weighting (`str`, *optional*, defaults to `"rank"`): sample weights, `"rank"` (the paper's), `"confidence"` or
            `"none"`.
        rank_base (`int`, *optional*, defaults to 1): rank of the best item in the rank weights, 0 or 1.
        scale_by_temperature_squared (`bool`, *optional*, defaults to `True`): multiply KL by the squared temperature.
        loss_chunk_size (`int`, *optional*): positions per chunk of the loss; chosen from catalogue and device by
            default.
        num_sampled_items (`int`, *optional*): compute the loss over the true items and so many others, drawn anew for
            each step ([`sampled_distillation_loss`]), for catalogues beyond a few hundred thousand items. All items
            by default, and if there are no more than that.
        loss_normalization (`str`, *optional*, defaults to `"dataset"`): what a step's summed loss is divided by.
            `"dataset"`: the mean number of positions of a step, a constant, so that each position counts the same over
            an epoch although length-bucketed batches hold few or many. `"batch"`: the number of positions in this
            step, as [`~transformers.Trainer`] does.
        length_bucketing (`bool`, *optional*, defaults to `True`): batch histories of like length, so that little is
            padding.
        max_positions_per_batch (`int`, *optional*): cap a device's batch by its padded positions, rows times longest
            history (at most the model's `max_length`), instead of by `per_device_train_batch_size`: as many histories
            of like length as fit. So memory and time of a batch hardly vary, and the batches' shapes are few and the
            same in each epoch. An LLM's prompt comes on top of it, for each row. Evaluation is not concerned.
        seen_items (`str`, *optional*, defaults to `"mask"`): in evaluation, leave out the items of the history
            (`"mask"`) or rank them too (`"keep"`, for data with repeats).
        early_stopping_patience (`int`, *optional*): stop after so many evaluations without a better
            `metric_for_best_model`. Off by default.
    """

    temperature: float = field(default=2.0, metadata={"help": "Softens both distributions in the KL term."})
    kl_weight: float = field(default=0.5, metadata={"help": "Weight of KL against cross-entropy."})
    weighting: str = field(default="rank", metadata={"help": "Sample weights.", "choices": WEIGHTINGS})
    rank_base: int = field(
        default=1, metadata={"help": "Rank of the best item in the rank weights.", "choices": (0, 1)}
    )
    scale_by_temperature_squared: bool = field(
        default=True, metadata={"help": "Multiply KL by the squared temperature."}
    )
    loss_chunk_size: int | None = field(default=None, metadata={"help": "Positions per chunk of the loss."})
    num_sampled_items: int | None = field(
        default=None, metadata={"help": "Compute the loss over so many items, drawn anew for each step."}
    )
    loss_normalization: str = field(
        default="dataset",
        metadata={"help": "Divide a step's loss by its mean or its own positions.", "choices": NORMALIZATIONS},
    )
    length_bucketing: bool = field(default=True, metadata={"help": "Batch histories of like length."})
    max_positions_per_batch: int | None = field(
        default=None,
        metadata={"help": "Cap a device's batch by its padded positions instead of per_device_train_batch_size."},
    )
    seen_items: str = field(
        default="mask", metadata={"help": "Leave items of the history out of the ranking.", "choices": SEEN_ITEMS}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better metric_for_best_model."}
    )

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise ConfigurationError(f"temperature must be positive and finite, got {self.temperature}.")
        if not self.kl_weight >= 0:
            raise ConfigurationError(f"kl_weight must not be negative, got {self.kl_weight}.")
        at_least_one = ("loss_chunk_size", "num_sampled_items", "max_positions_per_batch", "early_stopping_patience")
        for name in at_least_one:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, or left out, got {getattr(self, name)}.")
        if self.max_positions_per_batch is not None and not self.length_bucketing:
            raise ConfigurationError(
                "max_positions_per_batch is for histories of like length: leave length_bucketing on."
            )
        for setting in fields(DistillationSettings):
            choices, value = setting.metadata.get("choices"), getattr(self, setting.name)
            if choices is not None and value not in choices:
                raise ConfigurationError(f"{setting.name} must be one of {tuple(choices)}, got {value!r}.")

    @classmethod
    def of(cls, args: TrainingArguments) -> DistillationSettings:
        """
        The settings that arguments carry. Plain [`~transformers.TrainingArguments`] carry none: for them the trainer
        samples and divides the loss as [`~transformers.Trainer`] does, and only what a teacher adds has its defaults.

        Raises:
            ConfigurationError: arguments of the other direction.
        """
        if isinstance(args, cls):
            return args
        if isinstance(args, DistillationSettings):
            raise ConfigurationError(f"{type(args).__name__} are the arguments of another trainer.")
        return cls(loss_normalization="batch", length_bucketing=False)


def refuse_what_has_no_effect(args: TrainingArguments, **passed) -> None:
    """
    Args:
        args ([`~transformers.TrainingArguments`]): a trainer's.
        passed: what else `Trainer` was given, by its names.

    Raises:
        ConfigurationError: something that `Trainer` would follow, and these trainers have no use for.
    """
    own_loss = "the loss is this trainer's own, in compute_loss"
    for name, is_set, reason in (
        ("label_smoothing_factor", args.label_smoothing_factor, own_loss),
        ("compute_loss_func", passed.get("compute_loss_func"), own_loss),
        ("neftune_noise_alpha", args.neftune_noise_alpha, "histories do not enter by the token embeddings"),
        ("eval_do_concat_batches=False", not args.eval_do_concat_batches, "ranks are one array"),
        (
            "batch_eval_metrics without a compute_metrics",
            args.batch_eval_metrics and "compute_metrics" not in passed,
            "ranks are one array",
        ),
        ("preprocess_logits_for_metrics", passed.get("preprocess_logits_for_metrics"), "metrics are made of ranks"),
    ):
        if is_set:
            raise ConfigurationError(f"{name} has no meaning here, since {reason}. Leave it out.")


@dataclass
class DistillationArguments(DistillationSettings, TrainingArguments):
    """
    Arguments that both directions of distillation share: all of [`~transformers.TrainingArguments`] and of
    [`DistillationSettings`].
    """

    def __post_init__(self):
        TrainingArguments.__post_init__(self)
        # Pinned memory speeds up copies to an accelerator; without one torch warns at every epoch.
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        DistillationSettings.__post_init__(self)
        # Releases of `Trainer` differ in whether they have it.
        strategy = getattr(self, "train_sampling_strategy", "random")
        if self.length_bucketing and strategy != "random":
            raise ConfigurationError(
                f"train_sampling_strategy={strategy!r} and length_bucketing, which is on by default, both say which "
                "histories share a batch: set length_bucketing=False, or leave the other out."
            )
        if self.max_positions_per_batch is not None:
            self._check_batching()

    def _check_batching(self) -> None:
        """Refuse what counts on batches of one number of rows."""
        conflicts = {
            "auto_find_batch_size": self.auto_find_batch_size,
            "dataloader_drop_last": self.dataloader_drop_last,
            "accelerator_config.split_batches": self.accelerator_config.split_batches,
            "accelerator_config.dispatch_batches": self.accelerator_config.dispatch_batches,
            "DataParallel (several GPUs in one process; start one per GPU with `accelerate launch`)": self.n_gpu > 1,
        }
        if found := [name for name, present in conflicts.items() if present]:
            raise ConfigurationError(f"max_positions_per_batch does not go with {' and '.join(found)}.")


@dataclass
class MutualDistillSettings(DistillationSettings):
    """
    [`DistillationSettings`] and what only the LLM's side needs.

    Args:
        refresh_item_vectors (`bool`, *optional*, defaults to `True`): inject the teacher's item vectors into the LLM
            before training.
    """

    refresh_item_vectors: bool = field(
        default=True, metadata={"help": "Inject the teacher's item vectors into the LLM before training."}
    )


@dataclass
class MutualDistillArguments(MutualDistillSettings, DistillationArguments):
    """
    Arguments of [`MutualDistillTrainer`]: the LLM learns, from a CRM. See [`MutualDistillSettings`].
    """

    learning_rate: float = field(default=5e-4, metadata={"help": "The initial learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs per round."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Histories per device and step."})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "Histories per device in evaluation."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up steps, or their share if below 1."})


@dataclass
class CRMSettings(DistillationSettings):
    """
    [`DistillationSettings`] and what only the CRM's side needs.

    Args:
        teacher_max_error (`float`, *optional*, defaults to 0.02): how far the scores of a teacher of more than 128
            dimensions may be off, root mean square in nats, so that it can be narrowed (see
            [`~TeacherCache.build`]); 0 keeps all of it. The default moves the teacher's distribution by a KL of about
            2e-4 nats; a [`TeacherCache`] that is given as the teacher stays as it was built.
        init_item_vectors (`bool`, *optional*, defaults to `False`): begin with the teacher's item vectors, brought to
            the student's width ([`~TeacherCache.item_vectors`]). Those of an LLM that reads titles know how items are
            alike before the student has seen them together. For a student that begins anew: one that is trained
            already has learned about its own vectors.
        dropout_with_teacher (`float`, *optional*): dropout while there is a teacher, the model's own by default. On
            sparse logs a CRM alone overfits without heavy dropout, and with it cannot follow a teacher, whose whole
            distributions keep it from overfitting.
    """

    teacher_max_error: float = field(
        default=0.02, metadata={"help": "How far a wide teacher's scores may be off, in nats, to be narrowed."}
    )
    init_item_vectors: bool = field(
        default=False, metadata={"help": "Begin with the teacher's item vectors, in the student's width."}
    )
    dropout_with_teacher: float | None = field(
        default=None, metadata={"help": "Dropout while there is a teacher; the model's own by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.teacher_max_error >= 0:
            raise ConfigurationError(f"teacher_max_error must not be negative, got {self.teacher_max_error}.")
        if self.dropout_with_teacher is not None and not 0 <= self.dropout_with_teacher < 1:
            raise ConfigurationError(f"dropout_with_teacher must be in [0, 1), got {self.dropout_with_teacher}.")


@dataclass
class CRMArguments(CRMSettings, DistillationArguments):
    """
    Arguments of [`CRMTrainer`]: the CRM learns, from the LLM or alone. See [`CRMSettings`].
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    num_train_epochs: float = field(default=100.0, metadata={"help": "Epochs per round."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Histories per device and step."})
    per_device_eval_batch_size: int = field(default=512, metadata={"help": "Histories per device in evaluation."})
    lr_scheduler_type: SchedulerType = field(default="constant", metadata={"help": "The learning rate schedule."})
