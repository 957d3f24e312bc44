"""Steps whose loss or gradients are not finite, or whose loss spikes: no weight changes; training skips them or stops.

Whether a step is bad is decided on the device, where AdamW's fused step reads it (`found_inf`, as of torch's gradient
scaler). The host learns of it a step later, while the device has the next one to work on, and before a checkpoint.
"""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from statex.recipe import Training

logger = logging.getLogger(__name__)

SETTLED = 16
"""Good steps of a kind of data before one can be a spike."""
REMEMBERED = 32
"""Steps that the mean of a kind's losses follows."""


class BadSteps(TrainerCallback, ExportableState):
    """Judges each step before the optimizer's, by the loss of all ranks and the norm of the gradients.

    A loss spikes where it exceeds the mean of the last good ones of its kind of data by `training.spike` nats.

    Args:
        training: the recipe's section.
        device: where it trains.
        describe: the kind of a step's batch and what it is called; steps are counted from 0.

    Raises:
        FloatingPointError: a bad step, or with `bad_steps = "skip"` more than `most_bad_steps` in a row.
    """

    def __init__(self, training: Training, device: torch.device, describe: Callable[[int], tuple[str, str]]):
        self.training, self.device, self.describe = training, device, describe
        self.losses: dict[str, torch.Tensor] = {}  # kind -> mean of good steps, number of them
        self.loss = torch.zeros((), device=device)
        self.unread: tuple[int, torch.Tensor, torch.cuda.Event | None] | None = None
        self.skipped = self.in_a_row = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        losses = {kind: tensor.tolist() for kind, tensor in self.losses.items()}
        return {"args": {}, "attributes": {"losses": losses, "skipped": self.skipped, "in_a_row": self.in_a_row}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what the checkpoint kept; those of earlier versions have nothing."""
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.losses = {kind: torch.tensor(values, device=self.device) for kind, values in kept["losses"].items()}
        self.skipped, self.in_a_row = kept["skipped"], kept["in_a_row"]

    def add(self, loss: torch.Tensor, step: int) -> torch.Tensor:
        """Count a micro-batch's share of the step's loss; returns what to log of it."""
        self.loss = self.loss + loss.detach()
        if self.training.bad_steps == "stop":
            return loss
        return torch.where(torch.isfinite(loss), loss, torch.nan_to_num(self._of_kind(step)[0]).to(loss.dtype))

    def judge(self, norm: torch.Tensor | float, step: int, optimizer: Any) -> None:
        """Keep a bad step from the optimizer.

        Args:
            norm: of all gradients, before they were clipped.
            optimizer: torch's own.
        """
        self._read()
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        loss, self.loss = self._mean_of_ranks(self.loss.float()), torch.zeros((), device=self.device)
        known, norm = self._of_kind(step), torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        mean, count = known
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self.training.spike is not None:
            is_bad = is_bad | ((count >= SETTLED) & (loss - mean > self.training.spike))
        after = torch.stack([mean + (loss - mean) / (count + 1).clamp(max=REMEMBERED), count + 1])
        self.losses[self.describe(step)[0]] = torch.where(is_bad, known, after)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = is_bad.float()
        elif is_bad:
            for group in optimizer.param_groups:  # every optimizer of torch passes over what has no gradient
                for parameter in group["params"]:
                    parameter.grad = None
        self._send(step, torch.stack([is_bad.float(), loss, norm, mean]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before anything is logged or saved, know of all steps."""
        if control.should_log or control.should_save:
            self._read()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know of the last step."""
        self._read()

    def _of_kind(self, step: int) -> torch.Tensor:
        return self.losses.setdefault(self.describe(step)[0], torch.zeros(2, device=self.device))

    def _mean_of_ranks(self, loss: torch.Tensor) -> torch.Tensor:
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(loss)
            loss = loss / torch.distributed.get_world_size()
        return loss

    def _send(self, step: int, verdict: torch.Tensor) -> None:
        event = None
        if self.device.type == "cuda":
            there = torch.empty(verdict.shape, pin_memory=True)
            there.copy_(verdict, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            verdict = there
        self.unread = step, verdict, event

    def _read(self) -> None:
        """Wait for the verdict on the step before; every rank reads the same one at the same moment."""
        if self.unread is None:
            return
        (step, verdict, event), self.unread = self.unread, None
        if event is not None:
            event.synchronize()
        is_bad, loss, norm, mean = verdict.tolist()
        self.in_a_row = self.in_a_row + 1 if is_bad else 0
        if not is_bad:
            return
        what = f"the loss is {loss:.4g} and the norm of the gradients {norm:.4g} at step {step + 1}"
        if math.isfinite(loss) and math.isfinite(norm):
            what += f", where training.spike allows {self.training.spike} above the recent {mean:.4g}"
        what += f" (batch: {self.describe(step)[1]})"
        if self.training.bad_steps == "stop":
            raise FloatingPointError(
                f'{what}; set training.bad_steps = "skip" to resume without such steps, or lower '
                "training.learning_rate or raise training.warmup_steps in a run of another name"
            )
        self.skipped += 1
        logger.warning("%s; skipped, as %d before it", what, self.skipped - 1)
        if self.in_a_row > self.training.most_bad_steps:
            raise FloatingPointError(
                f"{what}: more than training.most_bad_steps = {self.training.most_bad_steps} in a row; training has "
                "diverged; lower training.learning_rate or raise training.warmup_steps, in a run of another name"
            )
