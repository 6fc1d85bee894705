# SPDX-License-Identifier: Apache-2.0
"""One progress line per phase of a run: epochs done, the metric, the best so far, time left."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


class PhaseProgress(TrainerCallback):
    """
    Replaces the Trainer's progress bar and its printed log lines by a single bar.

    Args:
        title (`str`): what is being trained.
        metric (`str`): the evaluation metric to show, without its `eval_` prefix.
    """

    def __init__(self, title: str, metric: str):
        self.title = title
        self.metric = metric
        self.bar: tqdm | None = None

    @classmethod
    def install(cls, trainer: Trainer, title: str) -> None:
        """Put it in the place of whatever progress display the trainer has."""
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if not trainer.args.disable_tqdm:
            metric = trainer.args.metric_for_best_model or "loss"
            trainer.add_callback(cls(title, metric.removeprefix("eval_")))

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            layout = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, bar_format=layout)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        value = (metrics or {}).get(f"eval_{self.metric}")
        if self.bar is not None and value is not None:
            lower = self.metric.endswith("loss") if args.greater_is_better is None else not args.greater_is_better
            best = value if state.best_metric is None else (min if lower else max)(value, state.best_metric)
            self.bar.set_postfix_str(f"epoch {state.epoch:.0f}, {self.metric} {value:.4f}, best {best:.4f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None
