"""Families of the first Mamba's type: one key per state channel, shared by all values, each pair with its own decay.

Seen as the other recurrences are, a layer has one head whose keys are B, whose queries are C and whose values are the
d_inner channels; the decay A [d_inner, N] grows with the state.
Letters: N state size, f factor.
"""

import copy
from typing import Any, ClassVar

import torch
from torch import nn

from statex.families.base import Family, Segment, StateGeometry, TensorRows
from statex.families.shared import INHERIT_NOISE, RECURRENT_TYPES, layers_of_types, refuse_rank, require_silu


class MambaTypeFamily(Family):
    """Mamba, arXiv 2312.00752. Subclasses say where the sizes are in their configurations."""

    keys_last = True
    recurrence = "selective_scan"
    kept_by_reinit = ("dt_proj.bias", "D")  # time scales, as Mamba2's; A_log cannot be kept, for it grows
    state_size_field: str
    mixer_options: ClassVar[dict[str, Any]] = {}
    """Further arguments of the mixer's constructor."""

    def check(self, config: Any) -> None:
        require_silu(config, "hidden_act")

    def inner_size(self, config: Any) -> int:
        """d_inner, how many values there are."""
        return config.intermediate_size

    def time_step_rank(self, config: Any) -> int:
        """How many rows of x_proj stand before those of B and C."""
        return config.time_step_rank

    def state_matrices(self, cached: torch.Tensor) -> torch.Tensor:
        return cached[:, None].mT

    def recurrent_layers(self, config: Any) -> list[int]:
        return layers_of_types(config, *RECURRENT_TYPES)

    def geometry(self, config: Any) -> StateGeometry:
        return StateGeometry(1, getattr(config, self.state_size_field), self.inner_size(config))

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        layer_config = copy.copy(config)
        setattr(layer_config, self.state_size_field, geometry.key_dim)
        return mixer_class(layer_config, layer_idx, **self.mixer_options)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # Each of B and C gets 1/sqrt(f), so that the f-fold sum over B C^T keeps its size
        scale = (before.key_dim / after.key_dim) ** 0.5
        b_and_c = self.b_and_c(config, before, after, "copy", "copy", noise=INHERIT_NOISE, scale=scale)
        return {"x_proj.weight": b_and_c, "A_log": decays(before, after, "copy")}

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        # New B writes, with decays of its own; new C is 0 and reads nothing yet
        b_and_c = self.b_and_c(config, before, after, "fresh", "zero")
        return {"x_proj.weight": b_and_c, "A_log": decays(before, after, "fresh")}

    def b_and_c(
        self, config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
    ) -> TensorRows:
        """The rows of x_proj: of the time step's input, of B and of C."""
        rank, sizes = self.time_step_rank(config), (before.key_dim, after.key_dim)
        B = Segment("B", 1, *sizes, fill=fill_B, **changes)  # type: ignore[arg-type]
        C = Segment("C", 1, *sizes, fill=fill_C, **changes)  # type: ignore[arg-type]
        return TensorRows((Segment("dt", 1, rank, rank), B, C))


def decays(before: StateGeometry, after: StateGeometry, fill: Any) -> TensorRows:
    """The columns of A_log [d_inner, N], fresh as the model's own initialisation has them."""
    return TensorRows((Segment("A", 1, before.key_dim, after.key_dim, fill=fill),), dim=1)
