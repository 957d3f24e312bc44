"""How many blocks keep their activations, where memory has room for some: what a block keeps is measured."""

import logging
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from statex.training.blocks import TrainingBlocks
from statex.utils.timing import allocated_memory, peak_memory, reset_peak_memory

logger = logging.getLogger(__name__)

ROOM_LEFT = 0.06
"""Of a GPU's memory, for what its allocator does not count and cannot join."""
MEASURED_AFTER = 2
"""Steps: the first makes the optimizer's state, and it and the second compile."""


class KeepActivations(TrainerCallback):
    """Lets as many blocks keep their activations as fit, after a step that keeps nothing and one that keeps a block's.

    The peak of a step is at most that of the first, and what each block keeps beside it. Ranks keep equally many, or
    those that gather weights for a block would wait for one another.

    Args:
        blocks: of the model.
        memory: "most", what the GPU has; or the bytes that training may take at its peak.
        device: where it trains. Where memory is not measured, on a CPU, "most" keeps all, and bytes nothing.
    """

    def __init__(self, blocks: TrainingBlocks, memory: Literal["most"] | int, device: torch.device):
        self.blocks, self.memory, self.device = blocks, memory, device
        self.peak = 0  # bytes, of the step that keeps nothing
        self.held: dict[int, int] = {}  # bytes that the last block's forward leaves, by the number of blocks kept
        self.hooks: list[RemovableHandle] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where nothing can be measured, decide at once."""
        self.measured_step = state.global_step + MEASURED_AFTER
        if self.device.type == "cuda":
            return
        if self.memory == "most":
            self.blocks.num_kept = len(self.blocks.blocks)
        else:
            logger.warning("activation_memory: memory is not measured on this device; nothing is kept")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to measure, and keep the last block's activations in the second of the two steps."""
        step = state.global_step - self.measured_step
        if self.device.type != "cuda" or step not in (0, 1):
            return
        self.blocks.num_kept = step
        reset_peak_memory(self.device)
        last, before = self.blocks.blocks[-1], []
        self.hooks = [
            last.register_forward_pre_hook(lambda *_: before.append(allocated_memory(self.device))),
            last.register_forward_hook(lambda *_: self.held.update({step: allocated_memory(self.device) - before[-1]})),
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the second of them keep as many as there is room for."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        step = state.global_step - self.measured_step
        if self.device.type == "cuda" and step == 1:
            self.peak = peak_memory(self.device)
        elif self.device.type == "cuda" and step == 2:
            of_block = max(1, self.held[1] - self.held[0])
            room = (self._memory() - self.peak) // of_block
            self.blocks.num_kept = _smallest(max(0, min(len(self.blocks.blocks), room)), self.device)
            counts = self.blocks.num_kept, len(self.blocks.blocks), of_block / 2**30
            logger.info("%d of %d blocks keep their activations, %.2f GiB each", *counts)

    def _memory(self) -> int:
        if self.memory != "most":
            return self.memory
        return int((1 - ROOM_LEFT) * torch.cuda.get_device_properties(self.device).total_memory)


def _smallest(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers."""
    if not torch.distributed.is_initialized():
        return number
    tensor = torch.tensor(number, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MIN)
    return int(tensor)
