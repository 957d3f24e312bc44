"""Families of the Mamba2 type: the key dimension (`state_size`) grows, inside each group of B and of C.

They differ in the names of their configurations' fields and in which layers are recurrent.
Letters: H heads, P head dim, N state size, G groups, f factor.
"""

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import nn

from statex.errors import UserError
from statex.families.base import Family, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields
from statex.families.shared import (
    INHERIT_NOISE,
    RECURRENT_TYPES,
    layers_of_types,
    refuse_rank,
    require_silu,
)

LONGEST_CHUNK = 1024
"""Any sequence is padded to whole chunks, and work and memory inside one grow with the square of its length."""
ChunkSize = Annotated[int, Field(ge=1, le=LONGEST_CHUNK)]


@dataclass(frozen=True)
class Mamba2Names:
    """The fields of a configuration that the sizes of a Mamba2-type mixer come from."""

    num_heads: str
    head_dim: str
    state_size: str
    num_groups: str
    activation: str | None
    """Of the convolution; None where it is always SiLU."""


class Mamba2TypeFields(ConfigFields):
    """What the fields of all these families must be together."""

    names: ClassVar[Mamba2Names]

    @field_validator("time_step_limit", check_fields=False)
    @classmethod
    def _is_a_range(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2:
            # transformers writes infinity as an object
            low, high = (float(str(one.get("__float__"))) if isinstance(one, dict) else one for one in value)
            if all(type(one) in (int, float) for one in (low, high)) and 0 <= low < high:
                return value
        raise ValueError("is not a range of time steps; use two numbers, the first at least 0 and below the second")

    @model_validator(mode="after")
    def _groups_have_heads(self):
        names = self.names
        H, G = getattr(self, names.num_heads), getattr(self, names.num_groups)
        if H % G:
            raise UserError(names.num_groups, G, f"does not divide {names.num_heads} = {H}", "use a divisor")
        return self


class Mamba2TypeFamily(Family):
    """Mamba2, arXiv 2405.21060; expansion of its key dimension: arXiv 2509.22630, section 3."""

    fields: type[Mamba2TypeFields]
    keys_last = True
    kept_by_reinit = ("dt_bias", "A_log", "D")  # time scales: made fresh they cost recall, 0.825 against 0.928

    @property
    def names(self) -> Mamba2Names:
        """The names of the configuration's fields."""
        return self.fields.names

    def check(self, config: Any) -> None:
        if self.names.activation is not None:
            require_silu(config, self.names.activation)

    def recurrent_layers(self, config: Any) -> list[int]:
        return layers_of_types(config, *RECURRENT_TYPES)

    def geometry(self, config: Any) -> StateGeometry:
        names = self.names
        return StateGeometry(*(getattr(config, name) for name in (names.num_heads, names.state_size, names.head_dim)))

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        layer_config = copy.copy(config)
        setattr(layer_config, self.names.state_size, geometry.key_dim)
        mixer = mixer_class(layer_config, layer_idx)
        self.fill_buffers(layer_config, mixer)
        return mixer

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # Each of B and C gets 1/sqrt(f), so that the f-fold sum over B C^T keeps its size. The convolution carries the
        # factor, which is exact up to the curvature of SiLU.
        scale = (before.key_dim / after.key_dim) ** 0.5
        return {
            "in_proj.weight": self._projection(config, before, after, "copy", "copy", noise=INHERIT_NOISE),
            "in_proj.bias": self._projection(config, before, after, "copy", "copy"),
            "conv1d.weight": self._convolution(config, before, after, "copy", "copy", scale=scale),
            "conv1d.bias": self._convolution(config, before, after, "copy", "copy", scale=scale),
        }

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        # New B writes; new C is 0 and reads nothing yet. Its filter is fresh: with both zero, neither would ever learn.
        return {
            "in_proj.weight": self._projection(config, before, after, "fresh", "zero"),
            "in_proj.bias": self._projection(config, before, after, "fresh", "zero"),
            "conv1d.weight": self._convolution(config, before, after, "fresh", "fresh"),
            "conv1d.bias": self._convolution(config, before, after, "fresh", "zero"),
        }

    def _b_and_c(
        self, config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
    ) -> tuple[Segment, Segment]:
        sizes = getattr(config, self.names.num_groups), before.key_dim, after.key_dim
        return Segment("B", *sizes, fill=fill_B, **changes), Segment("C", *sizes, fill=fill_C, **changes)  # type: ignore[arg-type]

    def _projection(
        self, config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
    ) -> TensorRows:
        H, d_inner = before.num_heads, before.num_heads * before.value_dim
        z, x, dt = Segment("z", 1, d_inner, d_inner), Segment("x", 1, d_inner, d_inner), Segment("dt", 1, H, H)
        return TensorRows((z, x, *self._b_and_c(config, before, after, fill_B, fill_C, **changes), dt))

    def _convolution(
        self, config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
    ) -> TensorRows:
        d_inner = before.num_heads * before.value_dim
        x = Segment("x", 1, d_inner, d_inner)
        return TensorRows((x, *self._b_and_c(config, before, after, fill_B, fill_C, **changes)))
