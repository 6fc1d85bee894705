# SPDX-License-Identifier: Apache-2.0
"""The Trainer of both directions: cross-entropy and KL against a cached teacher, evaluation by full ranking."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, PredictionOutput, rotate_checkpoints, seed_worker

from ..data import RankingCollator, SequenceCollator
from ..data.arrow import column_array
from ..distillation import (
    ListedScores,
    ListedTeacherCache,
    TeacherCache,
    distillation_loss,
    draw_negatives,
    sampled_distillation_loss,
)
from ..distillation.stored_teacher import StoredTeacher
from ..errors import ConfigurationError
from ..evaluation import ranking_metrics, score_targets
from ..files import write_manifest
from ..models import RecommenderModel
from ..models.recommender import supervised
from ..processes import on_main_process
from .arguments import DistillationArguments, DistillationSettings
from .checkpoints import LOSS_SUMS_NAME, last_whole_checkpoint, rehome
from .guard import StepGuard
from .loss_chunks import LossChunks
from .model_card import trainer_card
from .sampler import LengthBucketSampler, LengthSortedSampler, PositionBudgetBatchSampler, SamplerEpoch
from .sparse_rows import RowAdamW, with_row_values


# With an underscore in front, because pushes to the Hub leave such names out.
TEACHER_CACHE_NAME = "_teacher_cache"
OPTIMIZERS_BY_ROWS = ("adamw_torch", "adamw_torch_fused")
LOSS_PARTS = ("cross_entropy", "kl", "weight_mean", "agreement")
LOADER_OPTIONS = (
    *("num_workers", "pin_memory", "persistent_workers"),
    *("multiprocessing_context", "prefetch_factor", "in_order"),
)


class DistillationTrainer(Trainer):
    """
    A [`~transformers.Trainer`] for a [`RecommenderModel`] that learns from the data and, if there is one, a teacher.

    Everything works as in `Trainer`. What is added: the loss is [`distillation_loss`] against the teacher's cached
    output; evaluation ranks the last item of every row among all items and reports HR, NDCG and MRR; `predict` returns
    the ranks, in the order of the rows; the parts of the loss are logged; checkpoints and pushes carry the vocabulary,
    and a model card with results.

    It takes the place of `Trainer` in a script by its name alone. With plain [`~transformers.TrainingArguments`] it
    draws the same batches and, without a teacher, follows the same losses. Differences: the default collator is
    [`SequenceCollator`]; `compute_metrics` is given ranks (1 is best) of shape `(n,)` as `predictions` and the true
    items `(n,)` as `label_ids`, since scores over all items would not fit into memory; `eval_loss` is the
    cross-entropy of the ranked item, not of all positions.

    Args:
        model ([`RecommenderModel`]): the student.
        args ([`~transformers.TrainingArguments`], *optional*): the arguments; `arguments_class` is the kind that also
            holds the settings of distillation, and the default.
        train_dataset ([`~datasets.Dataset`], *optional*): rows as [`split_leave_one_out`] makes them.
        eval_dataset ([`~datasets.Dataset`], *optional*): likewise.
        teacher ([`RecommenderModel`], [`TeacherCache`] or [`ListedTeacherCache`], *optional*): a model is run once
            over the training set, into `args.output_dir/_teacher_cache`, when training begins. Without a teacher this
            trains the model alone.
        kwargs: further arguments of [`~transformers.Trainer`], e.g. `model_init`, which is called at every `train()`.

    Raises:
        ConfigurationError: a student that is no [`RecommenderModel`], or a teacher over another catalogue.
    """

    arguments_class: type[TrainingArguments] = DistillationArguments
    settings_class: type[DistillationSettings] = DistillationSettings
    # The loss below is divided by all that is accumulated already; both names, because releases differ in the one
    # they read.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RecommenderModel | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        teacher: RecommenderModel | TeacherCache | ListedTeacherCache | None = None,
        **kwargs,
    ):
        if model is not None:
            self._check_student(model)
        args = args or self.arguments_class("trainer_output")
        self.settings = self.settings_class.of(args)
        # Before `Trainer`'s own constructor, which may call `model_init`.
        self.teacher = teacher
        self._teacher_cache: StoredTeacher | None = None
        self._teacher_items: torch.Tensor | None = None
        self._loss_sums: dict[str, torch.Tensor] = {}
        self._loss_chunks = LossChunks(self.settings.loss_chunk_size)
        self._batch_sampler: PositionBudgetBatchSampler | None = None
        self._collates_by_model = kwargs.get("data_collator") is None
        kwargs.setdefault("compute_metrics", _ranking_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._fit_collator(self.model)
        self.guard = StepGuard()
        self.add_callback(self.guard)
        self._sampler_epoch = SamplerEpoch()
        self.add_callback(self._sampler_epoch)
        if self.settings.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.settings.early_stopping_patience))
        if teacher is not None:
            self._check_teacher(teacher)

    def _check_student(self, model) -> None:
        if not isinstance(model, RecommenderModel):
            raise ConfigurationError(f"{type(self).__name__} trains a RecommenderModel, got {type(model).__name__}.")

    def _fit_collator(self, model: RecommenderModel) -> None:
        if self._collates_by_model:
            self.data_collator = SequenceCollator(max_length=model.config.max_length)

    def call_model_init(self, trial=None):
        """As in `Trainer`; the collator and what a teacher injects follow the new model."""
        model = super().call_model_init(trial)
        self._check_student(model)
        self._fit_collator(model)
        self._prepare_student(model)
        return model

    def _check_teacher(self, teacher) -> None:
        is_cache = isinstance(teacher, StoredTeacher)
        num_items = teacher.manifest["num_items"] if is_cache else teacher.config.num_items
        if num_items != self.model.config.num_items:
            raise ConfigurationError(
                f"The teacher scores {num_items} items and the student {self.model.config.num_items}: both must be "
                "built over the same item vocabulary."
            )
        vocabularies = teacher.vocabulary, self.model.vocabulary
        if None not in vocabularies and (difference := vocabularies[0].first_difference(vocabularies[1])):
            raise ConfigurationError(f"Teacher and student have different item vocabularies: {difference}.")
        if is_cache and isinstance(self.train_dataset, Dataset):
            teacher.check(dataset=self.train_dataset)

    # --- data ----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        # What the collator and the samplers read; the model's forward does not know all of them.
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "item_ids", "row_id", "length"]))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.settings.length_bucketing or not _has_lengths(train_dataset):
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self._batches_per_step
        sampler = LengthBucketSampler(column_array(train_dataset, "length"), rows, self._sampler_seed)
        self._sampler_epoch.sampler = sampler
        return sampler

    @property
    def _batches_per_step(self) -> int:
        """Batches of one optimizer step over all processes."""
        return self.args.world_size * self.args.gradient_accumulation_steps

    @property
    def _sampler_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> DataLoader:
        """As in `Trainer`; with `max_positions_per_batch`, batches of as many rows as fit."""
        if self.settings.max_positions_per_batch is None:
            return super().get_train_dataloader()
        self._batch_sampler = self._sampler_epoch.sampler = self._budgeted_batches()
        # Releases of `Trainer` differ in which of them they know.
        options = {name: getattr(self.args, f"dataloader_{name}", None) for name in LOADER_OPTIONS}
        loader = DataLoader(
            self._remove_unused_columns(self.train_dataset, description="training"),
            batch_sampler=self._batch_sampler,
            collate_fn=self.data_collator,
            worker_init_fn=partial(seed_worker, num_workers=options["num_workers"], rank=self.args.process_index),
            **{name: value for name, value in options.items() if value is not None},
        )
        return self.accelerator.prepare(loader)

    def _budgeted_batches(self) -> PositionBudgetBatchSampler:
        budget = self.settings.max_positions_per_batch
        if not _has_lengths(self.train_dataset):
            raise ConfigurationError(
                f"max_positions_per_batch={budget} needs the lengths of all rows: a datasets.Dataset with a column "
                f"length as the training set, got {type(self.train_dataset).__name__} without one."
            )
        positions = np.clip(column_array(self.train_dataset, "length") - 1, 1, self.model.config.max_length)
        if isinstance(self.data_collator, SequenceCollator) and self.data_collator.pad_to_multiple_of:
            positions += -positions % self.data_collator.pad_to_multiple_of
        return PositionBudgetBatchSampler(
            positions, budget, self.args.world_size, self._batches_per_step, self._sampler_seed
        )

    def _get_eval_sampler(self, eval_dataset: Dataset):
        if not self.settings.length_bucketing or not _has_lengths(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthSortedSampler(column_array(eval_dataset, "length"))

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

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train as [`~transformers.Trainer.train`] does, after the teacher has been cached.

        With `resume_from_checkpoint=True` it goes on from the last checkpoint that is whole. Torn ones are passed
        over.

        Raises:
            TrainingError: the loss is not finite.
            ConfigurationError: nothing to resume from, `num_sampled_items` where sparse gradients do not work, or
                `max_positions_per_batch` for data whose rows have no lengths or do not fit.
        """
        if self.settings.max_positions_per_batch is not None and self.model_init is None:
            # For its errors, which should not come after a teacher has been cached.
            self._budgeted_batches()
        if self._embedding_by_rows is not None:
            self._check_sparse_gradients()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = on_main_process(lambda: last_whole_checkpoint(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ConfigurationError(f"There is no whole checkpoint in {self.args.output_dir} to resume from.")
        self._prepare_teacher()
        self._prepare_student(self.model)
        self._loss_sums = {}
        if resume_from_checkpoint:
            on_main_process(lambda: rehome(resume_from_checkpoint))
            self._loss_sums = self._sums_of(resume_from_checkpoint)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._embedding_by_rows is not None:
                self._embedding_by_rows.sparse = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; a loss that is not finite ends the training at this step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.watch(loss)
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; rows that are there a second time, to give every process as many, bear no labels."""
        return super().get_batch_samples(self._without_repeats(epoch_iterator), num_batches, device)

    def _without_repeats(self, batches):
        progress = self.accelerator.gradient_state
        for batch in batches:
            if self.args.world_size > 1 and progress.end_of_dataloader and (remainder := self._remainder()) > 0:
                # The last rows of an epoch, in the order of the processes, are followed by the first ones again.
                rows = len(batch["labels"])
                own = min(max(remainder - rows * self.args.process_index, 0), rows)
                batch["labels"][own:] = -100
            yield batch

    def _remainder(self) -> int:
        """Rows of an epoch that are left for its last batches over all processes; 0 or less if those are full."""
        remainder = self.accelerator.gradient_state.remainder
        may_repeat = self._batch_sampler is None and not self.args.dataloader_drop_last
        if remainder < 0 and may_repeat and isinstance(self.train_dataset, Dataset):
            # `accelerate` does not know it in an epoch that is resumed.
            remainder = len(self.train_dataset) % self.callback_handler.train_dataloader.total_batch_size
        return remainder

    def _prepare_teacher(self) -> None:
        if self.teacher is None:
            return
        cache = self.teacher
        if isinstance(cache, StoredTeacher):
            cache.check(num_items=self.model.config.num_items, dataset=self.train_dataset)
        else:
            cache = TeacherCache.for_teacher(
                self.teacher.to(self.args.device),
                self.train_dataset,
                os.path.join(self.args.output_dir, TEACHER_CACHE_NAME),
                batch_size=self.args.eval_batch_size,
                max_error=self._teacher_max_error,
            )
        self._teacher_cache = cache
        self._teacher_items = None if cache.item_matrix is None else cache.item_matrix.to(self.args.device)

    @property
    def _teacher_max_error(self) -> float:
        """How far the scores of a teacher may be off once it is cached, in nats."""
        return 0.0

    def _prepare_student(self, model: RecommenderModel) -> None:
        """What is done to a student before it is trained, each time there is a new one."""
        # Of a new model in `Trainer`'s constructor nothing is known of the teacher yet; `train` comes later.
        if self._teacher_cache is not None:
            self._take_item_vectors(model, self._teacher_cache)

    def _take_item_vectors(self, model: RecommenderModel, teacher: StoredTeacher) -> None:
        """What a subclass's student takes over from its teacher beside the distributions."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross-entropy plus weighted KL against the cached teacher, over every position that has a label."""
        items, loss_function, teacher_items = self._items_of_step(inputs["labels"])
        teacher = self._teacher_output(inputs)
        if isinstance(teacher, ListedScores):
            loss_function, teacher = partial(loss_function, teacher_lists=teacher), None
        outputs = model(inputs["item_ids"], _attention_mask(inputs), items=items)
        hidden, item_matrix, labels = supervised(outputs.hidden, inputs["labels"], outputs.item_matrix)
        divisor = self._loss_divisor(labels, num_items_in_batch)
        loss_of_chunks = partial(
            loss_function,
            hidden,
            item_matrix,
            labels,
            teacher,
            teacher_items,
            temperature=self.settings.temperature,
            kl_weight=self.settings.kl_weight,
            weighting=self.settings.weighting,
            rank_base=self.settings.rank_base,
            scale_by_temperature_squared=self.settings.scale_by_temperature_squared,
            num_items_in_batch=divisor,
        )
        # Autocast ends with the model's forward, and most of a step's arithmetic is here.
        with self.accelerator.autocast():
            parts = self._loss_chunks.run(lambda size: loss_of_chunks(chunk_size=size), labels.numel())
        self._record(parts, labels.numel(), divisor)
        # Gradients are averaged over processes, and the divisor counts the positions of all of them.
        loss = parts.loss * self.accelerator.num_processes
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def _teacher_output(self, inputs) -> torch.Tensor | ListedScores | None:
        if self._teacher_cache is None:
            return None
        if "row_id" not in inputs:
            raise ConfigurationError(
                "The batches have no row_id, by which the teacher's output is found: collate with SequenceCollator, "
                "and keep the column row_id in the data."
            )
        return self._teacher_cache.lookup(inputs["row_id"], inputs["labels"], _attention_mask(inputs))

    def _loss_divisor(self, labels: torch.Tensor, num_items_in_batch) -> float | torch.Tensor:
        """Positions of one optimizer step over all processes: on average (`"dataset"`) or in this step (`"batch"`)."""
        if self.settings.loss_normalization == "dataset" and _has_lengths(self.train_dataset):
            return self._rows_per_step * self._mean_positions
        if num_items_in_batch is not None:
            return num_items_in_batch
        return max(labels.numel(), 1) * self.accelerator.num_processes

    @property
    def _rows_per_step(self) -> float:
        """Training rows of one optimizer step over all processes; under a budget of positions, on average."""
        if self._batch_sampler is None:
            return self.args.train_batch_size * self._batches_per_step
        return len(self._batch_sampler.positions) / self._batch_sampler.steps_per_epoch

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """As in `Trainer`; under a budget of positions, on average."""
        return super().get_total_train_batch_size(args) if self._batch_sampler is None else round(self._rows_per_step)

    @property
    def _mean_positions(self) -> float:
        """Supervised positions per training row."""
        max_length = self.model.config.max_length
        if self.__dict__.get("_mean_positions_of") != (id(self.train_dataset), max_length):
            positions = column_array(self.train_dataset, "length") - 1
            self._mean_positions_value = float(np.minimum(positions, max_length).mean())
            self._mean_positions_of = (id(self.train_dataset), max_length)
        return self._mean_positions_value

    # --- a sample of the items -----------------------------------------------------------------------------------

    @property
    def _num_negatives(self) -> int | None:
        """How many items besides the true ones a step's loss is over; `None` for all."""
        size = self.settings.num_sampled_items
        return size if size is not None and size < self.model.config.num_items else None

    def _items_of_step(self, labels: torch.LongTensor):
        """The items whose rows the loss takes (`None` for all), that loss, and the teacher's rows."""
        if self._num_negatives is None:
            return None, distillation_loss, self._teacher_items
        num_items, seed = self.model.config.num_items, (self.args.seed, self.state.global_step)
        # The same for all processes and accumulated batches of a step, so that their number changes nothing.
        negatives = draw_negatives(num_items, self._num_negatives, seed).to(labels.device)
        items = torch.cat([negatives, labels[labels != -100]])
        teacher_items = None if self._teacher_items is None else self._teacher_items[items]
        return items, partial(sampled_distillation_loss, negatives=negatives, num_items=num_items), teacher_items

    @property
    def _embedding_by_rows(self) -> nn.Embedding | None:
        """The embedding that a step reads and updates only some rows of."""
        return None if self._num_negatives is None else self.model.tied_embedding

    def _check_sparse_gradients(self) -> None:
        args = self.args
        over_gloo = args.world_size == 1 or torch.distributed.get_backend() == "gloo"
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or args.n_gpu > 1 or not over_gloo:
            raise ConfigurationError(
                "num_sampled_items gives the item matrix a sparse gradient, which works in one process and in several "
                "over gloo, but not over NCCL, in DataParallel, FSDP or DeepSpeed: train on one device, or leave it "
                "out."
            )
        if args.optim not in OPTIMIZERS_BY_ROWS:
            raise ConfigurationError(
                f"num_sampled_items updates the item matrix by rows, for which optim must be one of "
                f"{OPTIMIZERS_BY_ROWS}, got {args.optim.value!r}."
            )

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in `Trainer`; with `num_sampled_items` one that updates the item matrix by rows, [`RowAdamW`]."""
        if self._embedding_by_rows is not None:
            self._embedding_by_rows.sparse = True
            if self.optimizer_cls_and_kwargs is None:
                _, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
                settings.pop("fused", None)
                self.optimizer_cls_and_kwargs = RowAdamW, settings
        return super().create_optimizer(model)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; with `num_sampled_items` clipping, which knows dense gradients alone, is given those."""
        super().create_accelerator_and_postprocess()
        if self.settings.num_sampled_items is not None:
            clip = self.accelerator.clip_grad_norm_
            self.accelerator.clip_grad_norm_ = lambda parameters, *args: clip(with_row_values(parameters), *args)

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
            totals = self._sums_over_processes()
            positions = totals.pop("positions")
            logs = {**logs, **{name: total / max(positions, 1) for name, total in totals.items()}}
            self._loss_sums = {}
        super().log(logs, start_time)

    def _sums_over_processes(self) -> dict[str, float]:
        names = list(self._loss_sums)
        sums = torch.stack([torch.as_tensor(self._loss_sums[name]).float().to(self.args.device) for name in names])
        return dict(zip(names, self.accelerator.reduce(sums, "sum").tolist(), strict=True))

    # --- evaluation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Rank the last labelled item of each row. Ranks `(B,)` are gathered over processes, never scores `(B, N)`."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = model(inputs["item_ids"], _attention_mask(inputs), last_only=True)
        last = _attention_mask(inputs).sum(dim=1) - 1
        targets = inputs["labels"].gather(1, last.unsqueeze(1)).squeeze(1)
        seen = inputs["seen"] if self.settings.seen_items == "mask" else None
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

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`; a manifest is its last file, and older checkpoints stay until it is there."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        sums = self._sums_over_processes() if self._loss_sums else {}
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        (checkpoint / LOSS_SUMS_NAME).write_text(json.dumps(sums))
        write_manifest(checkpoint)
        rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _sums_of(self, checkpoint: str) -> dict[str, torch.Tensor]:
        """What `log` would have reported next, so that a stop in the middle leaves no gap in it."""
        path = Path(checkpoint, LOSS_SUMS_NAME)
        sums = json.loads(path.read_text()) if path.is_file() else {}
        # They are of all processes together, and will be added up over them again.
        share = float(self.is_world_process_zero())
        return {name: torch.tensor(value * share, device=self.args.device) for name, value in sums.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # `Trainer` pickles its arguments beside the weights, and pushes them: not with the token.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return (model or self.model).load_weights(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        return self.model.load_weights(self.state.best_model_checkpoint)

    # --- Hub -----------------------------------------------------------------------------------------------------

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            # `Trainer` copies only the weights and the configuration out of the checkpoint.
            self.accelerator.unwrap_model(self.model).save_companions(self.args.output_dir)
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write `README.md` into `args.output_dir`: results and protocol, settings, an example that runs, citation.

        Args:
            language (`str`, *optional*): of the item titles.
            license (`str`, *optional*): of the model.
            tags (`str` or `list[str]`, *optional*): beside those of this package.
            model_name (`str`, *optional*): the heading; the repository's name by default.
            finetuned_from (`str`, *optional*): the base model; the LLM's backbone by default, if it is on the Hub.
            tasks (`str` or `list[str]`, *optional*): task of the results in the header.
            dataset_tags (`str` or `list[str]`, *optional*): Hub ids of the data.
            dataset (`str` or `list[str]`, *optional*): name of the data; with it the results enter the header.
            dataset_args (`str` or `list[str]`, *optional*): its configuration.
        """
        if not self.is_world_process_zero():
            return
        card = trainer_card(
            self,
            model_name,
            dataset,
            language=language,
            license=license,
            tags=tags,
            base_model=finetuned_from,
            datasets=dataset_tags,
            task=_first(tasks),
            dataset_config=_first(dataset_args),
        )
        Path(self.args.output_dir, "README.md").write_text(card, encoding="utf-8")


def _first(value: str | list[str] | None) -> str | None:
    return value[0] if isinstance(value, list) else value


def _ranking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return ranking_metrics(prediction.predictions)


def _attention_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The collator's mask; another collator may leave it out, since padding is 0."""
    return inputs["attention_mask"] if "attention_mask" in inputs else (inputs["item_ids"] != 0).long()


def _has_lengths(dataset) -> bool:
    return isinstance(dataset, Dataset) and "length" in dataset.column_names
