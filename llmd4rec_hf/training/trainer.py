# SPDX-License-Identifier: Apache-2.0
"""The Trainer of both directions: cross-entropy and KL against a cached teacher, evaluation by full ranking."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..data.sequences import item_id_range
from ..distillation import (
    ListedScores,
    ListedTeacherCache,
    TeacherCache,
    distillation_loss,
    draw_negatives,
    sampled_distillation_loss,
)
from ..distillation.stored_teacher import StoredTeacher
from ..distillation.walk import autocast_dtype, default_chunk_size, default_slice_size
from ..errors import ConfigurationError
from ..evaluation import ranking_metrics, score_targets
from ..files import write_manifest
from ..models import RecommenderEnsemble, RecommenderModel
from ..models.recommender import supervised
from ..modes import changed
from ..processes import on_every_process, on_main_process
from .arguments import refuse_what_has_no_effect
from .batching import HistoryTrainer, has_lengths
from .checkpoints import checkpoint_to_resume, rotate_checkpoints
from .guard import StepGuard
from .loss_chunks import LossChunks
from .loss_sums import LOSS_SUMS_NAME, LossSums
from .model_card import trainer_card
from .precision import bf16_slowdown
from .sparse_rows import RowAdamW, check_sparse_gradients, with_row_values


logger = logging.get_logger(__name__)

# With an underscore in front, because pushes to the Hub leave such names out.
TEACHER_CACHE_NAME = "_teacher_cache"


class DistillationTrainer(HistoryTrainer):
    """
    A [`~transformers.Trainer`] for a [`RecommenderModel`] that learns from the data and, if there is one, a teacher.

    Everything works as in `Trainer`. What is added: the loss is [`distillation_loss`] against the teacher's cached
    output; evaluation ranks the last item of every row among all items and reports HR, NDCG and MRR; `predict` returns
    the ranks, in the order of the rows; the parts of the loss are logged; checkpoints and pushes carry the vocabulary,
    and a model card with results.

    It takes the place of `Trainer` in a script by its name alone, where arguments are given by theirs. With plain
    [`~transformers.TrainingArguments`] it draws the same batches and, without a teacher, follows the same losses.
    Differences: the default collator is [`SequenceCollator`]; `compute_metrics` is given ranks (1 is best) of shape
    `(n,)` as `predictions` and the true items `(n,)` as `label_ids`, since scores over all items would not fit into
    memory, with `length_bucketing` in the order of the rows' lengths; `eval_loss` is the cross-entropy of the ranked
    item, not of all positions; `dataloader_drop_last` leaves out rows in training alone; another loss
    (`label_smoothing_factor`, `compute_loss_func`), `neftune_noise_alpha`, `eval_do_concat_batches=False`,
    `preprocess_logits_for_metrics`, and `batch_eval_metrics` without a `compute_metrics`, are refused.

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

    # The loss below is divided by all that is accumulated already; both names, because releases differ in the one
    # they read.
    loss_is_scaled_for_ga = True
    # While a checkpoint is saved.
    _limit_of_checkpoints: int | None = None

    def __init__(
        self,
        model: RecommenderModel | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        teacher: RecommenderModel | TeacherCache | ListedTeacherCache | None = None,
        **kwargs,
    ):
        # Before `Trainer`'s own constructor, which may call `model_init`.
        self.teacher = getattr(teacher, "_orig_mod", teacher)  # of a compiled one
        self._teacher_cache: StoredTeacher | None = None
        self._teacher_items: torch.Tensor | None = None
        args = args or self.arguments_class("trainer_output")
        refuse_what_has_no_effect(args, **kwargs)
        kwargs.setdefault("compute_metrics", _ranking_metrics)
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.model_accepts_loss_kwargs = True
        self._loss_chunks = LossChunks(self.settings.loss_chunk_size)
        self._loss_sums = LossSums(self.args.device)
        self.guard = StepGuard()
        self.add_callback(self.guard)
        if self.settings.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.settings.early_stopping_patience))
        if self.teacher is not None:
            self._check_teacher(self.teacher)

    def call_model_init(self, trial=None):
        """As in `Trainer`; the collator and what a teacher injects follow the new model."""
        model = super().call_model_init(trial)
        self._prepare_student(model)
        return model

    def _check_teacher(self, teacher) -> None:
        is_cache = isinstance(teacher, StoredTeacher)
        if not is_cache and not isinstance(teacher, RecommenderModel):
            raise ConfigurationError(
                "teacher must be a RecommenderModel (RecommenderModel.from_pretrained loads one), a TeacherCache, or, "
                f"for a black box, a ListedTeacherCache, got {type(teacher).__name__}."
            )
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

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, *args, **kwargs):
        """
        Train as [`~transformers.Trainer.train`] does, after the teacher has been cached.

        With `resume_from_checkpoint=True` it goes on from the last checkpoint that is whole. Torn ones are passed
        over.

        Raises:
            TrainingError: the loss is not finite.
            ConfigurationError: nothing to resume from, a student that is an ensemble, items that it lacks, a
                vocabulary of others, `num_sampled_items` where sparse gradients do not work, or
                `max_positions_per_batch` for data whose rows have no lengths or do not fit.
        """
        if self.model is None:  # between the trials of a hyperparameter search, whose models `Trainer` drops
            self.model = self.call_model_init(trial)
        self._check_before_training()
        checkpoint = on_main_process(lambda: checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir))
        self._warn_of_slow_numbers()
        self._prepare_teacher()
        self._prepare_student(self.model)
        self._loss_sums = LossSums(self.args.device)
        if checkpoint is not None:
            self._loss_sums.resume(checkpoint, self.is_world_process_zero())
        try:
            return super().train(checkpoint, trial, *args, **kwargs)
        finally:
            if self._embedding_by_rows is not None:
                self._embedding_by_rows.sparse = False

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; a loss that is not finite ends the training at this step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.guard.watch(loss)
        return loss

    def _check_before_training(self) -> None:
        """Refuse what a training would end by, or pass over, after a teacher has been cached."""
        if isinstance(self.model, RecommenderEnsemble):
            raise ConfigurationError("An ensemble is not trained: train its members, or a student that it teaches.")
        self.model.check_vocabulary()
        if self.settings.max_positions_per_batch is not None and self.model_init is None:
            self._budgeted_batches()  # for its errors
        waits = self.settings.early_stopping_patience is not None
        if waits and (self.args.metric_for_best_model is None or self.args.eval_strategy == "no"):
            raise ConfigurationError(
                "early_stopping_patience waits for a better metric_for_best_model: set that, e.g. to 'ndcg@10', "
                "with eval_strategy and save_strategy 'epoch', and load_best_model_at_end."
            )
        if self._embedding_by_rows is not None:
            given = self.optimizer_cls_and_kwargs[0] if self.optimizer_cls_and_kwargs else type(self.optimizer)
            check_sparse_gradients(self.args, self.is_fsdp_enabled or self.is_deepspeed_enabled, given)
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) == 0:
            raise ConfigurationError("The training set is empty: there is nothing to learn from.")
        self._check_items(self.train_dataset, "training")

    def _check_items(self, rows, use: str) -> None:
        if not isinstance(rows, Dataset) or "item_ids" not in rows.column_names:
            return
        (_, highest), num_items = item_id_range(rows), self.model.config.num_items
        if highest > num_items:
            raise ConfigurationError(
                f"The {use} set holds the item id {highest} and the student scores {num_items} items: build it "
                "with num_items=len(vocabulary) of the vocabulary that the log was split with."
            )

    def _warn_of_slow_numbers(self) -> None:
        if self.args.bf16 and self.args.device.type == "cpu" and (slowdown := bf16_slowdown()) > 1.5:
            logger.warning_once(
                f"A matrix product in bf16 takes this processor {slowdown:.1f} times as long as one in float32: "
                "without bf16 training is faster."
            )

    def _prepare_teacher(self) -> None:
        if self.teacher is None:
            return
        if not has_lengths(self.train_dataset) or "row_id" not in self.train_dataset.column_names:
            raise ConfigurationError(
                "With a teacher the training set must be a datasets.Dataset with the columns item_ids, row_id and "
                "length, as split_leave_one_out makes it."
            )
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
            parts = self._loss_chunks.run(
                lambda size: loss_of_chunks(chunk_size=size), self._default_chunk_size, labels.numel()
            )
        self._loss_sums.add(parts, labels.numel(), divisor, has_teacher=self._teacher_cache is not None)
        # Gradients are averaged over processes, and the divisor counts the positions of all of them.
        loss = parts.loss * self.accelerator.num_processes
        outputs.loss = loss
        return (loss, outputs) if return_outputs else loss

    def _default_chunk_size(self) -> int:
        """Positions that the loss takes at a time if nobody says how many."""
        device = self.args.device
        if self._num_negatives is not None:
            return default_slice_size(self._num_negatives, device)
        return default_chunk_size(self.model.config.num_items, device, autocast_dtype(device.type))

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
        if self.settings.loss_normalization == "dataset" and has_lengths(self.train_dataset):
            return self._rows_per_step * self._mean_positions
        if num_items_in_batch is not None:
            # Told not to, `Trainer` does not add up the processes' counts: the mean is of each one's own mean.
            own = 1 if self.args.average_tokens_across_devices else self.accelerator.num_processes
            return torch.as_tensor(num_items_in_batch).clamp_min(1) * own
        return max(labels.numel(), 1) * self.accelerator.num_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does; training logs gain the means per position of the parts of the loss."""
        if "loss" in logs:
            logs = {**logs, **self._loss_sums.take_means(self.accelerator)}
        super().log(logs, start_time)

    # --- a sample of the items -----------------------------------------------------------------------------------

    @property
    def _num_negatives(self) -> int | None:
        """How many items besides the true ones a step's loss is over; `None` for all."""
        size = self.settings.num_sampled_items
        return size if size is not None and size < self.model.config.num_items else None

    def _items_of_step(self, labels: torch.LongTensor):
        """The items whose rows the loss takes (`None` for all), that loss, and the teacher's rows."""
        if self._num_negatives is None:
            return None, partial(distillation_loss, count_ranks=False), self._teacher_items
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

    def create_optimizer(self, *model) -> torch.optim.Optimizer:  # releases differ in whether they are given one
        """As in `Trainer`; with `num_sampled_items` one that updates the item matrix by rows, [`RowAdamW`]."""
        kind = self.optimizer_cls_and_kwargs
        if self._embedding_by_rows is not None:
            self._embedding_by_rows.sparse = True
            if kind is None:
                _, settings = self.get_optimizer_cls_and_kwargs(self.args, *model)
                settings.pop("fused", None)
                kind = RowAdamW, settings
        # Not for good: the next training may be one at another learning rate.
        with changed(self, optimizer_cls_and_kwargs=kind):
            return super().create_optimizer(*model)

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; with `num_sampled_items` clipping, which knows dense gradients alone, is given those."""
        super().create_accelerator_and_postprocess()
        if self.settings.num_sampled_items is not None:
            clip = self.accelerator.clip_grad_norm_
            self.accelerator.clip_grad_norm_ = lambda parameters, *args: clip(with_row_values(parameters), *args)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, *args, **kwargs):
        """As in `Trainer`; items that the model lacks are named before any is looked up."""
        self._check_items(dataloader.dataset, "evaluation")
        return super().evaluation_loop(dataloader, *args, **kwargs)

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
        # Over all processes, without the rows that are there a second time to give every process as many.
        loss = self.accelerator.gather_for_metrics(scores.nll).mean()
        return (loss, None, None) if prediction_loss_only else (loss, scores.ranks, targets)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """As in `Trainer`; a manifest is its last file, and older checkpoints stay until it is there."""
        limit = self.args.save_total_limit
        with changed(self.args, save_total_limit=None), changed(self, _limit_of_checkpoints=limit):
            super()._save_checkpoint(model, trial)
        sums = self._loss_sums.over_processes(self.accelerator)
        self.accelerator.wait_for_everyone()
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"

        def close():
            if self.args.should_save:
                (checkpoint / LOSS_SUMS_NAME).write_text(json.dumps(sums))
                write_manifest(checkpoint)
                rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

        # None goes on before: if it ended, as after a signal, the launcher would end the one that is still writing.
        on_every_process(close)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # `Trainer` pickles its arguments beside the weights, and pushes them: not with the token, and in a checkpoint
        # with the limit that it is saved without.
        limit = self.args.save_total_limit or self._limit_of_checkpoints
        with changed(self.args, hub_token=None, save_total_limit=limit):
            super()._save(output_dir, state_dict)

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
            self.teacher is not None,
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
