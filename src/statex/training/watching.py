"""Whether an expansion takes hold: the gradients of its fresh tensors and of the inherited ones, and its new state."""

from collections.abc import Callable, Set
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from statex.expansion.edits import StoredPlan
from statex.expansion.state_use import effective_rank, layer_state, new_state_energy
from statex.models.caches import cache_of

Read = Callable[[Callable[[dict[str, torch.Tensor], bool], Any]], list[Any]]
"""What calls a function with each part of a batch in turn, and whether it is the last; returns what it returned."""


class WatchGradients(TrainerCallback):
    """Norms of the steps that are logged, as the optimizer sees the gradients, after clipping."""

    def __init__(self, fresh_tensors: Set[str]):
        self.fresh_tensors = fresh_tensors
        self.norms: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, where this step is logged; nothing waits for the device."""
        if (state.global_step + 1) % args.logging_steps:
            return
        gradients: dict[str, list[torch.Tensor]] = {"fresh": [], "inherited": []}
        for name, parameter in kwargs["model"].named_parameters():
            if parameter.grad is not None:
                is_fresh = name.removeprefix("module.") in self.fresh_tensors
                gradients["fresh" if is_fresh else "inherited"].append(parameter.grad)
        norms = {kind: torch.nn.utils.get_total_norm(some) for kind, some in gradients.items() if some}
        self.norms = {kind: norm.full_tensor() if isinstance(norm, DTensor) else norm for kind, norm in norms.items()}

    def logged(self) -> dict[str, float]:
        """What was measured since it was last asked for."""
        found, self.norms = self.norms, {}
        return {f"grad_norm_{kind}": float(norm) for kind, norm in found.items()}


STATE_USE = ("new_state_energy", "effective_rank")
"""What is logged of each expanded layer's state, as `<name>_layer_<index>`."""


class WatchState:
    """How much of its new state an expanded model uses after one sequence, every n steps.

    Args:
        plan: of the model; where nothing is expanded, nothing is ever due.
        every: n; None: never.
    """

    def __init__(self, plan: StoredPlan | None, every: int | None):
        self.plan = plan if plan is not None and plan.kind == "expand" else None
        self.every = every
        self.last: int | None = None

    def is_due(self, step: int) -> bool:
        """Whether to look after so many steps, where it was not done yet."""
        return self.plan is not None and self.every is not None and step % self.every == 0 and step != self.last

    @torch.no_grad()
    def measure(self, model: Any, read: Read, step: int, group: ProcessGroup | None) -> dict[str, float]:
        """Look after `step` steps.

        Args:
            model: is left in evaluation mode.
            read: runs a function on one sequence, of one document; or on this rank's slice, and in segments.
            group: the ranks that share the sequence; they all get what the last one finds, at its end.
        """
        assert self.plan is not None
        self.last = step
        model.eval()

        def read_segment(inputs: dict[str, torch.Tensor], is_last: bool) -> Any:
            output = model(input_ids=inputs["input_ids"], use_cache=is_last, logits_to_keep=1)
            return cache_of(output) if is_last else None

        cache = read(read_segment)[-1]
        rows = []
        for layer in self.plan.layers:
            state = layer_state(cache, layer, self.plan.model_type)
            rows.append(torch.cat([new_state_energy(state, layer), effective_rank(state).to(state.device)]))
        values = torch.stack(rows)  # [layers, 2]
        if group is not None:
            dist.broadcast(values, group=group, group_src=group.size() - 1)
        return {
            f"{name}_layer_{layer.index}": value
            for layer, row in zip(self.plan.layers, values.tolist(), strict=True)
            for name, value in zip(STATE_USE, row, strict=True)
        }


def logged_state_use(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What `WatchState` found, with the step each time, of all that was logged."""
    return [
        {name: value for name, value in entry.items() if name == "step" or name.startswith(STATE_USE)}
        for entry in history
        if any(name.startswith(STATE_USE) for name in entry)
    ]
