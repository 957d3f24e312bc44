"""Forward and backward of a micro-batch as one CUDA graph: the host starts one graph, not a thousand kernels.

A small model is otherwise trained at the speed of the host: the kernels of a step of 45M parameters and 65,536 tokens
take an H200 71 ms, and the host takes 121 ms to launch them (docs/results/training.md).
"""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.families import family_of
from statex.recipe import Training
from statex.settings import Data
from statex.training.arguments import steps_in_backward

logger = get_logger(__name__)  # of the main process alone

EAGER = 2
"""Micro-batches of a shape that are run kernel by kernel before it is captured; they compile and tune its kernels."""
MOST_GRAPHS = 32
"""Shapes that are captured; recall data has a few, and a run with more is better off without."""

Step = Callable[[dict[str, Tensor], Any], Tensor]
"""Forward and backward of inputs and the number of items that the loss is a mean over; returns the loss, detached."""


def captures(config: PreTrainedConfig, training: Training, data: Data, device: torch.device, world_size: int) -> bool:
    """Whether steps are captured; "auto": on one GPU, where each step has the same kernels.

    Raises:
        UserError: `cuda_graphs` is true where steps cannot be captured.
    """
    check_capture("training", training, data, config, device=device, world_size=world_size)
    if training.cuda_graphs != "auto":
        return training.cuda_graphs
    could = device.type == "cuda" and world_size == 1 and family_of(config).compiled_by_default
    return could and _obstacle(training, data) is None


def check_capture(
    section: str,
    training: Training,
    data: Data,
    config: PreTrainedConfig | None = None,
    *,
    device: torch.device | None = None,
    world_size: int = 1,
) -> None:
    """Raise UserError where a section asks for captured steps of what cannot be captured.

    Args:
        config: of the model; None: not looked at.
        device: where it will train; None: not looked at.
    """
    if training.cuda_graphs is not True:
        return
    obstacle = _obstacle(training, data)
    if obstacle is None and world_size > 1:
        obstacle = f"{world_size} processes, which wait for one another"
    if obstacle is None and config is not None and not family_of(config).blocks_compile:
        obstacle = f"{config.model_type}, in whose steps the host looks at the device"
    if obstacle is None and device is not None and device.type != "cuda":
        obstacle = f"a {device.type.upper()}, which has no CUDA graphs"
    if obstacle is not None:
        raise UserError(f"{section}.cuda_graphs", True, f"does not go with {obstacle}", 'leave it out, or use "auto"')


def _obstacle(training: Training, data: Data) -> str | None:
    """What makes steps differ from one another in more than their numbers, or needs the host in the midst of one."""
    if training.gradient_checkpointing:
        return "gradient_checkpointing, by which memory decides what is computed again"
    if data.reset_state_at_documents:
        return "data.reset_state_at_documents, which gives each step other documents"
    if training.sequence_parallel > 1:
        return "sequence_parallel, whose processes wait for one another"
    if training.backpropagation_length is not None:
        return "backpropagation_length, by which states pass from one pass to the next outside of them"
    for field in ("debug", "torch_empty_cache_steps"):
        if training.trainer.get(field):
            return f"training.trainer.{field}, which needs the host within a step"
    optimizer = training.trainer.get("optim")
    if steps_in_backward(training):
        return f"training.trainer.optim = {optimizer!r}, which steps within the backward pass"
    if os.environ.get("WANDB_WATCH", "false") not in ("", "false"):
        return "WANDB_WATCH, whose hooks read gradients within the backward pass"
    return None


class CapturedSteps:
    """Runs micro-batches, each shape by its own graph from its third on.

    Gradients are summed up in buffers that the graphs share and that stay where they are; whoever clears them by
    `zero_grad` finds them cleared.

    Args:
        model: on a CUDA device. Parameters to which the first micro-batches give no gradient stay without.

    Raises:
        UserError: the GPU has no room for a graph beside what is there.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.graphs: dict[tuple, _Graph] = {}
        self.seen: Counter[tuple] = Counter()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: dict[str, Tensor], num_items: Any) -> Tensor:
        """`step(inputs, num_items)`, or the same by a graph."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        key = shapes if isinstance(num_items, Tensor) else (*shapes, num_items)
        self.seen[key] += 1
        if key not in self.graphs and (self.seen[key] <= EAGER or len(self.graphs) == MOST_GRAPHS):
            loss = step(inputs, num_items)
            for parameter in self.model.parameters():
                if parameter.grad is not None and parameter not in self.gradients:
                    self.gradients[parameter] = torch.zeros_like(parameter)
            return loss
        self._point_gradients_here()
        if key not in self.graphs:
            logger.info("capturing a step of %s", shapes)
            try:
                self.graphs[key] = _Graph(step, inputs, num_items, self.pool)
            except torch.cuda.OutOfMemoryError as error:
                problem = "has no room for the memory of a captured step beside that of the steps before"
                remedy = "set it to false (the same run resumes), or use fewer sequences_per_device"
                raise UserError("training.cuda_graphs", "on", problem, remedy) from error
        return self.graphs[key](inputs, num_items)

    def _point_gradients_here(self) -> None:
        """A parameter without a gradient gets its buffer, cleared; one with another gradient has it in the buffer."""
        if cleared := [buffer for parameter, buffer in self.gradients.items() if parameter.grad is None]:
            torch._foreach_zero_(cleared)
        for parameter, buffer in self.gradients.items():
            if parameter.grad is not None and parameter.grad is not buffer:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer


class _Graph:
    """A step of one shape. Capturing runs nothing; the gradients of each replay are added to those that are there."""

    def __init__(self, step: Step, inputs: dict[str, Tensor], num_items: Any, pool: Any):
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.num_items = num_items.clone() if isinstance(num_items, Tensor) else num_items
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, which pin batches, may allocate meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = step(dict(self.inputs), self.num_items)

    def __call__(self, inputs: dict[str, Tensor], num_items: Any) -> Tensor:
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        if isinstance(num_items, Tensor):
            self.num_items.copy_(num_items, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
