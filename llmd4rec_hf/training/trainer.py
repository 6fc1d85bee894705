# SPDX-License-Identifier: Apache-2.0
"""The Trainer of both directions: cross-entropy and KL against a cached teacher, evaluation by full ranking."""

from __future__ import annotations

import os

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from ..data import RankingCollator, SequenceCollator
from ..distillation import TeacherCache, distillation_loss
from ..errors import ConfigurationError
from ..evaluation import ranking_metrics, score_targets
from ..models import RecommenderModel
from ..models.recommender import sequence_lengths, supervised
from .arguments import DistillationArguments
from .sampler import LengthBucketSampler, LengthSortedSampler


TEACHER_CACHE_NAME = "teacher_cache"
LOSS_PARTS = ("cross_entropy", "kl", "weight_mean", "agreement")


class DistillationTrainer(Trainer):
    """
    A [`~transformers.Trainer`] for a [`RecommenderModel`] that learns from the data and, if there is one, a teacher.

    Everything works as in `Trainer`. What is added: the loss is [`distillation_loss`] against the teacher's cached
    output; evaluation ranks the last item of every row among all items and reports HR, NDCG and MRR; `predict` returns
    the ranks, in the order of the rows; the parts of the loss are logged.

    Args:
        model ([`RecommenderModel`]): the student.
        args ([`DistillationArguments`], *optional*): the arguments; those of the class by default.
        train_dataset ([`~datasets.Dataset`], *optional*): rows as [`split_leave_one_out`] makes them.
        eval_dataset ([`~datasets.Dataset`], *optional*): likewise.
        teacher ([`RecommenderModel`] or [`TeacherCache`], *optional*): a model is run once over the training set, into
            `args.output_dir/teacher_cache`, when training begins. Without a teacher this trains the model alone.
        kwargs: further arguments of [`~transformers.Trainer`].

    Raises:
        ConfigurationError: a student that is no [`RecommenderModel`], or a teacher over another catalogue.
    """

    arguments_class: type[TrainingArguments] = DistillationArguments
    # The loss below is divided by all that is accumulated already; both names, because releases differ in the one
    # they read.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RecommenderModel | None = None,
        args: DistillationArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        teacher: RecommenderModel | TeacherCache | None = None,
        **kwargs,
    ):
        if model is not None and not isinstance(model, RecommenderModel):
            raise ConfigurationError(f"{type(self).__name__} trains a RecommenderModel, got {type(model).__name__}.")
        args = args or self.arguments_class("trainer_output")
        if model is not None:
            kwargs.setdefault("data_collator", SequenceCollator(max_length=model.config.max_length))
        kwargs.setdefault("compute_metrics", _ranking_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.model_accepts_loss_kwargs = True
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.teacher = teacher
        self._teacher_cache: TeacherCache | None = None
        self._teacher_items: torch.Tensor | None = None
        self._loss_sums: dict[str, torch.Tensor] = {}
        if teacher is not None:
            self._check_teacher(teacher)

    def _check_teacher(self, teacher) -> None:
        is_cache = isinstance(teacher, TeacherCache)
        num_items = teacher.manifest["num_items"] if is_cache else teacher.config.num_items
        if num_items != self.model.config.num_items:
            raise ConfigurationError(
                f"The teacher scores {num_items} items and the student {self.model.config.num_items}: both must be "
                "built over the same item vocabulary."
            )
        vocabularies = None if is_cache else teacher.vocabulary, self.model.vocabulary
        if None not in vocabularies and (difference := vocabularies[0].first_difference(vocabularies[1])):
            raise ConfigurationError(f"Teacher and student have different item vocabularies: {difference}.")

    # --- data ----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        # What the collator and the samplers read; the model's forward does not know all of them.
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "item_ids", "row_id", "length"]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.length_bucketing or not _has_lengths(train_dataset):
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthBucketSampler(train_dataset["length"], together, seed)

    def _get_eval_sampler(self, eval_dataset: Dataset):
        if not self.args.length_bucketing or not _has_lengths(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthSortedSampler(eval_dataset["length"])

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; batches also carry each row's whole history, which the model may not read to the end."""
        return self._with_history(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`; batches also carry each row's whole history, which the model may not read to the end."""
        return self._with_history(super().get_test_dataloader, test_dataset)

    def _with_history(self, get_dataloader, dataset):
        collator = self.data_collator
        self.data_collator = RankingCollator(collator)
        try:
            return get_dataloader(dataset)
        finally:
            self.data_collator = collator

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """Train as [`~transformers.Trainer.train`] does, after the teacher has been cached."""
        self._prepare_teacher()
        return super().train(*args, **kwargs)

    def _prepare_teacher(self) -> None:
        if self.teacher is None:
            return
        cache = self.teacher
        if isinstance(cache, TeacherCache):
            cache.check(num_items=self.model.config.num_items, dataset=self.train_dataset)
        else:
            cache = TeacherCache.for_teacher(
                self.teacher.to(self.args.device),
                self.train_dataset,
                os.path.join(self.args.output_dir, TEACHER_CACHE_NAME),
                batch_size=self.args.eval_batch_size,
            )
        self._teacher_cache = cache
        self._teacher_items = cache.item_matrix.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy plus weighted KL against the cached teacher, over every position that has a label."""
        outputs = model(inputs["item_ids"], inputs["attention_mask"])
        hidden, item_matrix, labels = supervised(outputs.hidden, inputs["labels"], outputs.item_matrix)
        divisor = self._loss_divisor(labels, num_items_in_batch)
        parts = distillation_loss(
            hidden,
            item_matrix,
            labels,
            self._teacher_hidden(inputs),
            self._teacher_items,
            temperature=self.args.temperature,
            kl_weight=self.args.kl_weight,
            weighting=self.args.weighting,
            rank_base=self.args.rank_base,
            scale_by_temperature_squared=self.args.scale_by_temperature_squared,
            chunk_size=self.args.loss_chunk_size,
            num_items_in_batch=divisor,
        )
        self._record(parts, labels.numel(), divisor)
        # Gradients are averaged over processes, and the divisor counts the positions of all of them.
        loss = parts.loss * self.accelerator.num_processes
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def _teacher_hidden(self, inputs) -> torch.Tensor | None:
        if self._teacher_cache is None:
            return None
        return self._teacher_cache.lookup(inputs["row_id"], inputs["labels"], inputs["attention_mask"])

    def _loss_divisor(self, labels: torch.Tensor, num_items_in_batch) -> float | torch.Tensor:
        """Positions of one optimizer step over all processes: on average (`"dataset"`) or in this step (`"batch"`)."""
        if self.args.loss_normalization == "dataset" and _has_lengths(self.train_dataset):
            rows = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            return rows * self._mean_positions
        if num_items_in_batch is not None:
            return num_items_in_batch
        return max(labels.numel(), 1) * self.accelerator.num_processes

    @property
    def _mean_positions(self) -> float:
        """Supervised positions per training row."""
        if self.__dict__.get("_mean_positions_of") is not self.train_dataset:
            positions = np.asarray(self.train_dataset["length"]) - 1
            self._mean_positions_value = float(np.minimum(positions, self.model.config.max_length).mean())
            self._mean_positions_of = self.train_dataset
        return self._mean_positions_value

    # --- logging -------------------------------------------------------------------------------------------------

    def _record(self, parts, positions: int, divisor) -> None:
        """Add up what `log` will report, without waiting for the device."""
        names = LOSS_PARTS if self._teacher_cache is not None else LOSS_PARTS[:1]
        for name in names:
            # The first two are sums over positions divided by `divisor`, the others means over positions.
            scale = divisor if name in LOSS_PARTS[:2] else positions
            self._loss_sums[name] = self._loss_sums.get(name, 0.0) + getattr(parts, name) * scale
        self._loss_sums["positions"] = self._loss_sums.get("positions", 0.0) + positions

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does; training logs gain the means per position of the parts of the loss."""
        if self._loss_sums and "loss" in logs:
            names = list(self._loss_sums)
            sums = torch.stack([torch.as_tensor(self._loss_sums[name]).float().to(self.args.device) for name in names])
            totals = dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))
            positions = totals.pop("positions")
            logs = {**logs, **{name: total / max(positions, 1) for name, total in totals.items()}}
            self._loss_sums = {}
        super().log(logs, start_time)

    # --- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Rank the last labelled item of each row. Ranks `(B,)` are gathered over processes, never scores `(B, N)`."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(inputs["item_ids"], inputs["attention_mask"], last_only=True)
        last = sequence_lengths(inputs["item_ids"], inputs["attention_mask"]) - 1
        targets = inputs["labels"].gather(1, last.unsqueeze(1)).squeeze(1)
        seen = inputs["seen"] if self.args.seen_items == "mask" else None
        scores = score_targets(outputs.hidden, outputs.item_matrix, targets, seen=seen)
        loss = scores.nll.mean()
        return (loss, None, None) if prediction_loss_only else (loss, scores.ranks, targets)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Ranks as `predictions` and true items as `label_ids`, both in the order of the rows, and the metrics."""
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        sampler = self._get_eval_sampler(test_dataset)
        if not isinstance(sampler, LengthSortedSampler):
            return output
        back = np.argsort(sampler.order)
        return output._replace(predictions=output.predictions[back], label_ids=output.label_ids[back])

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return (model or self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        return self.model.load_weights(self.state.best_model_checkpoint)


def _ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return ranking_metrics(prediction.predictions)


def _has_lengths(dataset) -> bool:
    return isinstance(dataset, Dataset) and "length" in dataset.column_names
