"""Families of the gated delta rule: the key dimension grows, inside each key head, or heads are merged.

They differ in the names of their projections and in how these lay their rows.
Letters: H value heads, G key heads (a divisor of H), K and V key and value dimension of a head, f factor.
"""

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from pydantic import model_validator
from torch import nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, Family, Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.shared import (
    INHERIT_NOISE,
    ONE_RATE,
    layers_of_types,
    refuse_rank,
    require_a_type_each,
    require_silu,
)

LayerType = Literal["linear_attention", "full_attention"]


class GatedDeltaFields(ConfigFields):
    """Fields of a configuration that the layers of the gated delta rule are made from."""

    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "linear_num_value_heads", "linear_value_head_dim", "linear_key_head_dim",
        "linear_conv_kernel_dim",
    )  # fmt: skip

    linear_num_key_heads: Size
    linear_num_value_heads: Size
    linear_key_head_dim: Size
    linear_value_head_dim: Size
    linear_conv_kernel_dim: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None
    intermediate_size: Size
    rms_norm_eps: PositiveFloat
    layer_types: list[LayerType] | None

    @model_validator(mode="after")
    def _heads_and_layers_fit(self):
        H, G = self.linear_num_value_heads, self.linear_num_key_heads
        if H is not None and G is not None and H % G:
            problem = f"does not divide linear_num_value_heads = {H}"
            raise UserError("linear_num_key_heads", G, problem, "use a divisor")
        require_a_type_each(self)
        return self


class GatedDeltaFamily(Family):
    """The gated delta rule, arXiv 2412.06464; expansion of a key dimension: arXiv 2509.22630, section 3.

    Keys are divided by their length, all channels together: else the rule would not be stable. Queries of an expanded
    layer are divided by the length of their old channels, and scaled as before: so the new ones may be anything where
    the new channels of the keys are 0, without a change of the function. (What divides a query is one factor on the
    whole head's output, which the norm behind it takes out but for its epsilon.)

    Heads are merged key head by key head, with the value heads of each, and all channels of a merged head are as old as
    one another. It has one decay rate and one rate of writing in the place of several, so all of it is made afresh.
    """

    fields: type[GatedDeltaFields]
    recurrence = "gated_delta"
    mixer_path = "model.layers.{}.linear_attn"
    norm_path = "model.layers.{}.input_layernorm"
    keys_last = False
    kept_by_reinit = ("dt_bias", "A_log")  # time scales, as Mamba2's
    methods: ClassVar = {"reinit": (GROW, MERGE), "inherit": (GROW,), "preserve": (GROW,)}
    merging_needs = ONE_RATE
    grows = 'key dimension, or with `method = "merge"` heads are merged'
    factors = (
        "2 and more; 4 where none is given. Of merging: divisors of the number of key heads; 4, 3 or 2, whichever is "
        "one first"
    )

    def check(self, config: Any) -> None:
        require_silu(config, "hidden_act")

    def recurrent_layers(self, config: Any) -> list[int]:
        return layers_of_types(config, "linear_attention")

    def geometry(self, config: Any) -> StateGeometry:
        return StateGeometry(
            config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
        )  # fmt: skip

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        layer_config = copy.copy(config)
        layer_config.linear_num_key_heads = num_key_heads(config, geometry)
        layer_config.linear_num_value_heads = geometry.num_heads
        layer_config.linear_key_head_dim = geometry.key_dim
        layer_config.linear_value_head_dim = geometry.value_dim
        mixer: Any = mixer_class(layer_config, layer_idx)
        mixer.query_channels = config.linear_key_head_dim * geometry.value_dim // config.linear_value_head_dim
        return mixer

    def num_mergeable_heads(self, config: Any, before: StateGeometry) -> int:
        return num_key_heads(config, before)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # The products of normalised copies are those of the old keys, and the reads grow by sqrt(f), which the norm
        # behind takes out: no factor is needed.
        rows = self._projections(config, before, after, "copy", "copy", INHERIT_NOISE)
        return rows | {"conv1d.weight": _convolution(config, before, after, "copy")}

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        # New channels of the keys are 0: anything else would change what a key overlaps with, hence what is written.
        # The queries' are fresh, and so are the filters: with both 0, neither would ever learn.
        rows = self._projections(config, before, after, "fresh", "zero", 0.0)
        return rows | {"conv1d.weight": _convolution(config, before, after, "fresh")}

    @abstractmethod
    def _projections(
        self, config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float
    ) -> dict[str, TensorRows]:
        """The rows of the projections that have those of queries and keys."""


def num_key_heads(config: Any, geometry: StateGeometry) -> int:
    """G of a layer: where heads were merged, as many fewer as it has fewer value heads."""
    return config.linear_num_key_heads * geometry.num_heads // config.linear_num_value_heads


def _convolution(config: Any, before: StateGeometry, after: StateGeometry, fill: Fill) -> TensorRows:
    """One filter a channel: all queries, all keys, all values."""
    sizes = num_key_heads(config, before), before.key_dim, after.key_dim
    num_values = before.num_heads * before.value_dim
    return TensorRows(
        (Segment("q", *sizes, fill=fill), Segment("k", *sizes, fill=fill), Segment("v", 1, num_values, num_values))
    )
