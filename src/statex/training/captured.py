"""Forward and backward of a micro-batch as one CUDA graph: the host starts one graph, not a thousand kernels.

A small model is otherwise trained at the speed of the host: the kernels of a step of 45M parameters and 65,536 tokens
take an H200 71 ms, and the host takes 121 ms to launch them (docs/results/training.md).
"""

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

logger = get_logger(__name__)  # of the main process alone

EAGER = 2
"""Micro-batches of a shape that are run kernel by kernel before it is captured: they compile, and tune."""
MOST_GRAPHS = 32
"""Shapes that are captured; recall data has a few, and a run with more is better off without."""

Step = Callable[[dict[str, Tensor], Any], Tensor]
"""Forward and backward of inputs and the number of items that the loss is a mean over; returns the loss, detached."""


def captures(config: PreTrainedConfig, training: Training, data: Data, device: torch.device, world_size: int) -> bool:
    """Whether steps are captured; "auto": on one GPU, where a step has the same kernels each time."""
    if training.cuda_graphs != "auto":
        return training.cuda_graphs
    could = device.type == "cuda" and world_size == 1 and family_of(config).compiled_by_default
    return could and _obstacle(training, data) is None


def check_capture(section: str, training: Training, data: Data, *, with_device: bool = True) -> None:
    """Raise UserError where a section asks for captured steps that could not be; `with_device`: on this machine."""
    if training.cuda_graphs is not True:
        return
    if (obstacle := _obstacle(training, data)) is not None:
        raise UserError(f"{section}.cuda_graphs", True, f"does not go with {obstacle}", 'leave it out, or use "auto"')
    if with_device and not torch.cuda.is_available():
        raise UserError(f"{section}.cuda_graphs", True, "needs a CUDA device", 'leave it out, or use "auto"')


def _obstacle(training: Training, data: Data) -> str | None:
    """What makes steps differ from one another in more than their numbers."""
    if training.gradient_checkpointing:
        return "gradient_checkpointing, by which memory decides what is computed again"
    if data.reset_state_at_documents:
        return "data.reset_state_at_documents, which gives each step other documents"
    if training.sequence_parallel > 1:
        return "sequence_parallel, whose processes wait for one another"
    return None


class CapturedSteps:
    """Runs micro-batches, each shape by its own graph from its third on.

    Gradients are summed up in buffers that the graphs share and that stay where they are; whoever clears them by
    `zero_grad` finds them cleared.

    Args:
        model: on a CUDA device. Its trainable parameters are those it has now.
    """

    def __init__(self, model: nn.Module):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.gradients = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.graphs: dict[tuple, _Graph] = {}
        self.seen: Counter[tuple] = Counter()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: dict[str, Tensor], num_items: Any) -> Tensor:
        """`step(inputs, num_items)`, or the same by a graph."""
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        key = shapes if isinstance(num_items, Tensor) else (*shapes, num_items)
        self.seen[key] += 1
        if key not in self.graphs and (self.seen[key] <= EAGER or len(self.graphs) == MOST_GRAPHS):
            return step(inputs, num_items)
        self._point_gradients_here()
        if key not in self.graphs:
            logger.info("capturing a step of %s", shapes)
            self.graphs[key] = _Graph(step, inputs, num_items, self.pool)
        return self.graphs[key](inputs, num_items)

    def _point_gradients_here(self) -> None:
        """A parameter without a gradient gets its buffer, cleared; one with another gradient has it in the buffer."""
        pairs = list(zip(self.parameters, self.gradients, strict=True))
        if cleared := [buffer for parameter, buffer in pairs if parameter.grad is None]:
            torch._foreach_zero_(cleared)
        for parameter, buffer in pairs:
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
