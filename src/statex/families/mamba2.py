"""Mamba2: the key dimension (`state_size`) grows, inside each group of B and of C.

Letters: H heads, P head dim, N state size, G groups, f factor.
"""

import copy
from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator
from torch import nn

from statex.errors import UserError
from statex.families.base import Family, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size

MODELING = "transformers.models.mamba2.modeling_mamba2"
INHERIT_NOISE = 0.3
"""Bare copies of rows get equal gradients and never diverge; with this share of noise they do."""

ACTIVATIONS = ("silu", "swish")
"""Those of the convolution that statex's ops have."""


LONGEST_CHUNK = 1024
"""Any sequence is padded to whole chunks, and work and memory inside one grow with the square of its length."""


class Mamba2Fields(ConfigFields):
    """Fields of a Mamba2 configuration."""

    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel",
    )  # fmt: skip

    num_heads: Size
    head_dim: Size
    state_size: Size
    n_groups: Size
    conv_kernel: Size
    expand: Size
    chunk_size: Annotated[int, Field(ge=1, le=LONGEST_CHUNK)]
    layer_norm_epsilon: PositiveFloat
    time_step_min: PositiveFloat
    time_step_max: PositiveFloat
    time_step_floor: PositiveFloat
    time_step_limit: Any

    @field_validator("time_step_limit")
    @classmethod
    def _is_a_range(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) == 2:
            # transformers writes infinity as an object
            low, high = (float(str(one.get("__float__"))) if isinstance(one, dict) else one for one in value)
            if all(type(one) in (int, float) for one in (low, high)) and 0 <= low < high:
                return value
        raise ValueError("is no range of time steps; use two numbers, the first at least 0 and below the second")

    @model_validator(mode="after")
    def _groups_have_heads(self):
        if self.num_heads % self.n_groups:
            problem = f"does not divide num_heads = {self.num_heads}"
            raise UserError("n_groups", self.n_groups, problem, "use a divisor")
        return self


class Mamba2Family(Family):
    """Mamba2, arXiv 2405.21060; expansion of its key dimension: arXiv 2509.22630, section 3."""

    model_type = "mamba2"
    fields = Mamba2Fields
    mixer_path = "backbone.layers.{}.mixer"
    norm_path = "backbone.layers.{}.norm"
    keys_last = True
    blocks_compile = True
    config_class = "transformers.models.mamba2.configuration_mamba2.Mamba2Config"
    model_class = f"{MODELING}.Mamba2Model"
    causal_lm_class = f"{MODELING}.Mamba2ForCausalLM"
    mixer_class = f"{MODELING}.Mamba2Mixer"
    norm_classes = (f"{MODELING}.Mamba2RMSNorm", f"{MODELING}.MambaRMSNormGated")
    kept_by_reinit = ("dt_bias", "A_log", "D")  # time scales: made fresh they cost recall, 0.825 against 0.928

    def check(self, config: Any) -> None:
        if config.hidden_act not in ACTIVATIONS:
            problem = "is an activation that statex's convolution lacks, which has SiLU only"
            raise UserError("hidden_act", config.hidden_act, problem, f"use one of {', '.join(ACTIVATIONS)}")

    def recurrent_layers(self, config: Any) -> list[int]:
        return list(range(config.num_hidden_layers))

    def geometry(self, config: Any) -> StateGeometry:
        return StateGeometry(config.num_heads, config.state_size, config.head_dim)

    def default_factor(self, config: Any, before: StateGeometry) -> int:
        return 4

    def expanded_geometry(self, config: Any, before: StateGeometry, factor: int, init: str) -> StateGeometry:
        if factor < 2:
            raise UserError("factor", factor, "does not enlarge the state", "use 2 or more")
        return StateGeometry(before.num_heads, factor * before.key_dim, before.value_dim)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        if rank is not None:
            raise UserError("rank", rank, "low-rank growth exists only for GLA", "leave rank out")
        layer_config = copy.copy(config)
        layer_config.state_size = geometry.key_dim
        return mixer_class(layer_config, layer_idx)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # Each of B and C gets 1/sqrt(f), so that the f-fold sum over B C^T keeps its size. The convolution carries the
        # factor, which is exact up to the curvature of SiLU.
        scale = (before.key_dim / after.key_dim) ** 0.5
        return {
            "in_proj.weight": _projection(config, before, after, "copy", "copy", noise=INHERIT_NOISE),
            "in_proj.bias": _projection(config, before, after, "copy", "copy"),
            "conv1d.weight": _convolution(config, before, after, "copy", "copy", scale=scale),
            "conv1d.bias": _convolution(config, before, after, "copy", "copy", scale=scale),
        }

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        if rank is not None:
            raise UserError("rank", rank, "low-rank growth exists only for GLA", "leave rank out")
        # New B writes; new C is 0 and reads nothing yet. Its filter is fresh: with both zero, neither would ever learn.
        return {
            "in_proj.weight": _projection(config, before, after, "fresh", "zero"),
            "in_proj.bias": _projection(config, before, after, "fresh", "zero"),
            "conv1d.weight": _convolution(config, before, after, "fresh", "fresh"),
            "conv1d.bias": _convolution(config, before, after, "fresh", "zero"),
        }


def _b_and_c(
    config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
) -> tuple[Segment, Segment]:
    sizes = config.n_groups, before.key_dim, after.key_dim
    return Segment("B", *sizes, fill=fill_B, **changes), Segment("C", *sizes, fill=fill_C, **changes)  # type: ignore[arg-type]


def _projection(
    config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
) -> TensorRows:
    d_inner, H = config.num_heads * config.head_dim, config.num_heads
    z, x, dt = Segment("z", 1, d_inner, d_inner), Segment("x", 1, d_inner, d_inner), Segment("dt", 1, H, H)
    return TensorRows((z, x, *_b_and_c(config, before, after, fill_B, fill_C, **changes), dt))


def _convolution(
    config: Any, before: StateGeometry, after: StateGeometry, fill_B: Any, fill_C: Any, **changes: float
) -> TensorRows:
    d_inner = config.num_heads * config.head_dim
    return TensorRows((Segment("x", 1, d_inner, d_inner), *_b_and_c(config, before, after, fill_B, fill_C, **changes)))
