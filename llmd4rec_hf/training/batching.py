# SPDX-License-Identifier: Apache-2.0
"""How histories become the batches of a Trainer, in training and in evaluation."""

from __future__ import annotations

from functools import partial

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput, seed_worker

from ..data import RankingCollator, SequenceCollator
from ..data.arrow import column_array
from ..errors import ConfigurationError
from ..models import RecommenderModel
from ..modes import changed
from .arguments import DistillationArguments, DistillationSettings
from .sampler import LengthBucketSampler, LengthSortedSampler, PositionBudgetBatchSampler, SamplerEpoch


LOADER_OPTIONS = (
    *("num_workers", "pin_memory", "persistent_workers"),
    *("multiprocessing_context", "prefetch_factor", "in_order"),
)


class HistoryTrainer(Trainer):
    """
    A [`~transformers.Trainer`] whose rows are histories of items, for a [`RecommenderModel`].

    It knows how rows are collated, which of them share a batch (at random, of like length, or as many as a budget of
    padded positions allows), and how many rows and positions a step has. What is learned from a batch is up to
    subclasses, see [`DistillationTrainer`].

    Args:
        model ([`RecommenderModel`] or `None`): the student; its longest history is also that of the batches.
        args ([`~transformers.TrainingArguments`]): the arguments.
        train_dataset ([`~datasets.Dataset`], *optional*): rows as [`split_leave_one_out`] makes them.
        eval_dataset ([`~datasets.Dataset`], *optional*): likewise.
        kwargs: further arguments of [`~transformers.Trainer`].

    Raises:
        ConfigurationError: a student that is no [`RecommenderModel`].
    """

    arguments_class: type[TrainingArguments] = DistillationArguments
    settings_class: type[DistillationSettings] = DistillationSettings

    def __init__(
        self,
        model: RecommenderModel | None,
        args: TrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **kwargs,
    ):
        if model is not None:
            self._check_student(model)
        # Before `Trainer`'s own constructor, which may call `model_init`.
        self.settings = self.settings_class.of(args)
        self._batch_sampler: PositionBudgetBatchSampler | None = None
        self._means_by_data: dict[tuple[int, int], float] = {}
        self._collates_by_model = kwargs.get("data_collator") is None
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self._fit_collator(self.model)
        self._sampler_epoch = SamplerEpoch()
        self.add_callback(self._sampler_epoch)

    def _check_student(self, model) -> None:
        if not isinstance(model, RecommenderModel):
            remedy = ": give its adapter to LLMRecommender.from_backbone" if hasattr(model, "peft_config") else ""
            if hasattr(model, "_orig_mod"):
                remedy = ": give the model as it was before torch.compile, and torch_compile=True in the arguments"
            raise ConfigurationError(
                f"{type(self).__name__} trains a RecommenderModel, got {type(model).__name__}{remedy}."
            )

    def _fit_collator(self, model: RecommenderModel) -> None:
        if self._collates_by_model:
            self.data_collator = SequenceCollator(max_length=model.config.max_length)

    def call_model_init(self, trial=None):
        """As in `Trainer`; the collator follows the new model."""
        model = super().call_model_init(trial)
        self._check_student(model)
        self._fit_collator(model)
        return model

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        # What the collator and the samplers read; the model's forward does not know all of them.
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "item_ids", "row_id", "length"]))

    # --- training ------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.settings.length_bucketing or not has_lengths(train_dataset):
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self._batches_per_step
        sampler = LengthBucketSampler(column_array(train_dataset, "length"), rows, self._sampler_seed)
        self._sampler_epoch.sampler = sampler
        return sampler

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
        # All processes have as many batches already, and evening out is what `accelerate` wants one batch size for.
        with changed(self.accelerator.dataloader_config, even_batches=False):
            return self.accelerator.prepare(loader)

    def _budgeted_batches(self) -> PositionBudgetBatchSampler:
        budget = self.settings.max_positions_per_batch
        if not has_lengths(self.train_dataset):
            raise ConfigurationError(
                f"max_positions_per_batch={budget} needs the lengths of all rows: a datasets.Dataset with a column "
                f"length as the training set, got {type(self.train_dataset).__name__} without one."
            )
        positions = np.clip(column_array(self.train_dataset, "length") - 1, 1, self._max_positions)
        if isinstance(self.data_collator, SequenceCollator) and self.data_collator.pad_to_multiple_of:
            positions += -positions % self.data_collator.pad_to_multiple_of
        return PositionBudgetBatchSampler(
            positions, budget, self.args.world_size, self._batches_per_step, self._sampler_seed
        )

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

    # --- what a step holds ---------------------------------------------------------------------------------------

    @property
    def _batches_per_step(self) -> int:
        """Batches of one optimizer step over all processes."""
        return batches_per_step(self.args)

    @property
    def _rows_per_step(self) -> float:
        """Training rows of one optimizer step over all processes, on average."""
        if self._batch_sampler is not None:
            return len(self._batch_sampler.positions) / self._batch_sampler.steps_per_epoch
        # Not of the arguments, which do not know of `auto_find_batch_size`.
        full = self._train_batch_size * self._batches_per_step
        rows = len(self.train_dataset)
        return full if self.args.dataloader_drop_last else rows / max(1, -(-rows // full))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """As in `Trainer`; under a budget of positions, on average."""
        return super().get_total_train_batch_size(args) if self._batch_sampler is None else round(self._rows_per_step)

    @property
    def _max_positions(self) -> int:
        """Most positions of a row that a batch holds."""
        read = self.model.config.max_length
        return min(self.data_collator.max_length, read) if isinstance(self.data_collator, SequenceCollator) else read

    @property
    def _mean_positions(self) -> float:
        """Supervised positions per training row."""
        key = id(self.train_dataset), self._max_positions
        if key not in self._means_by_data:
            positions = np.minimum(column_array(self.train_dataset, "length") - 1, self._max_positions)
            self._means_by_data = {key: float(positions.mean())}
        return self._means_by_data[key]

    # --- evaluation ----------------------------------------------------------------------------------------------

    def _get_eval_sampler(self, eval_dataset: Dataset):
        if not self.settings.length_bucketing or not has_lengths(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return LengthSortedSampler(column_array(eval_dataset, "length"))

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`; batches also carry each row's whole history, which the model may not read to the end."""
        return self._with_history(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`; batches also carry each row's whole history, which the model may not read to the end."""
        return self._with_history(super().get_test_dataloader, test_dataset)

    def _with_history(self, get_dataloader, dataset):
        collator = RankingCollator(self.data_collator)
        # Rows are left out of a training's steps alone, not of what is ranked.
        with changed(self, data_collator=collator), changed(self.args, dataloader_drop_last=False):
            return get_dataloader(dataset)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """As in `Trainer`; `predictions` and `label_ids` are in the order of the rows, whatever the batches were."""
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        sampler = self._get_eval_sampler(test_dataset)
        if output.predictions is None or not isinstance(sampler, LengthSortedSampler):
            return output
        back = np.argsort(sampler.order)
        return output._replace(predictions=output.predictions[back], label_ids=output.label_ids[back])


def batches_per_step(args: TrainingArguments) -> int:
    """Batches of `args.train_batch_size` rows that one optimizer step takes over all processes."""
    # Processes that split batches share each of them.
    sharing = 1 if args.accelerator_config.split_batches else args.world_size
    return sharing * args.gradient_accumulation_steps


def has_lengths(dataset) -> bool:
    """Whether the lengths of all rows are known without reading the rows."""
    return isinstance(dataset, Dataset) and "length" in dataset.column_names
