# SPDX-License-Identifier: Apache-2.0
"""What may end a training at a step: a signal, or a loss that is not finite."""

from __future__ import annotations

import os
import signal
import threading

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from ..errors import RunInterrupted, TrainingError
from .checkpoints import last_whole_checkpoint


class StopSignals:
    """
    Inside its `with` block SIGTERM and SIGINT (Ctrl-C) only ask for a stop, which comes when a trainer has ended its
    step and saved a checkpoint. A second one ends the process at once.

    Attributes:
        received (`int` or `None`): the signal that has come.
    """

    handled = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        # Python hands signals to the main thread alone, and lets no other one set their handlers.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.handled}
        return self

    def __exit__(self, *_) -> None:
        self.received = None
        self._restore()

    def _receive(self, number, frame) -> None:
        self.received = number
        self._restore()
        if PartialState().is_main_process:
            # Neither `print` nor a logger: the signal may have come in the middle of one.
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: stopping after this step; once more to stop at once.\n".encode())

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def raise_if_received(self, where: str) -> None:
        """
        Raises:
            RunInterrupted: a signal has come, on this process or another one.
        """
        number = _max_over_processes([self.received or 0])[0]
        if number:
            raise interrupted(number, where)


# One for the process, as signals are.
stop_signals = StopSignals()


def interrupted(number: int, where: str) -> RunInterrupted:
    """The error that tells where a signal stopped a run, and how to go on."""
    return RunInterrupted(
        f"Stopped by {signal.Signals(number).name} {where}. Everything is saved: started again with the same "
        "output_dir it goes on from there and ends with the same results.",
        number,
    )


class StepGuard(TrainerCallback):
    """
    Looks at every step whether a signal has come or the loss is not finite. All processes act on what any of them has
    seen, at the same step.

    Attributes:
        title (`str`): what is being trained, for the messages.
    """

    def __init__(self):
        self.title = "training"
        self._not_finite: torch.Tensor | None = None
        self._signal = self._stopping = 0

    def watch(self, loss: torch.Tensor) -> None:
        """Remember whether a loss was finite, without waiting for the device."""
        bad = ~loss.detach().isfinite()
        self._not_finite = bad if self._not_finite is None else self._not_finite | bad

    def on_train_begin(self, args, state, control, **kwargs):
        self._not_finite, self._signal, self._stopping = None, 0, 0

    def on_step_end(self, args, state, control, **kwargs):
        bad = self._not_finite is not None and bool(self._not_finite)
        self._not_finite = None
        self._signal, bad = _max_over_processes([stop_signals.received or 0, int(bad)], args.device)
        if bad:
            self._raise_not_finite(args, state, kwargs.get("lr_scheduler"))
        # After the last step of an epoch comes its evaluation: a checkpoint from in between would lack it for ever.
        if not float(state.epoch).is_integer():
            self._stop_if_asked(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_if_asked(control)

    def _stop_if_asked(self, control):
        if self._signal:
            self._stopping = self._signal
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._stopping:
            raise interrupted(self._stopping, f"in {self.title} after step {state.global_step}")

    def _raise_not_finite(self, args, state, scheduler) -> None:
        rate = "unknown" if scheduler is None else f"{scheduler.get_last_lr()[0]:.3g}"
        checkpoint = last_whole_checkpoint(args.output_dir)
        raise TrainingError(
            f"The loss is not finite in {self.title} at step {state.global_step}, epoch {state.epoch:.2f}, learning "
            f"rate {rate}. Last good checkpoint: {checkpoint or 'none'}. Lower the learning rate or max_grad_norm, "
            "or train in bf16 or fp32 instead of fp16."
        )


def _max_over_processes(values: list[int], device: torch.device | str | None = None) -> list[int]:
    """The largest of all processes' values, each."""
    state = PartialState()
    if state.num_processes == 1:
        return values
    mine = torch.zeros(state.num_processes, len(values), dtype=torch.long, device=device or state.device)
    mine[state.process_index] = torch.as_tensor(values)
    return reduce(mine, "sum").amax(dim=0).tolist()
