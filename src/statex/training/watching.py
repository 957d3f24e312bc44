"""Whether the fresh tensors of an expansion learn: the norms of their gradients and of the inherited ones', apart."""

from collections.abc import Set
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


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
