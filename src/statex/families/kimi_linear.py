"""Kimi Linear: heads of Kimi Delta Attention, whose every key channel has its own decay, are merged.

Letters: H heads, K key and value dimension of a head.
"""

import copy
from typing import Any, ClassVar

from torch import nn

from statex.families.base import MERGE, Family, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.gated_delta import LayerType
from statex.families.shared import ONE_RATE, layers_of_types, refuse_rank, require_silu

MODELING = "transformers.models.kimi_linear.modeling_kimi_linear"

IN_LINEAR_ATTN_CONFIG = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""Where in the object `linear_attn_config` the checkpoint of Kimi Linear has some fields, which go before others."""


class KimiLinearFields(ConfigFields):
    """Fields of a Kimi Linear configuration that its recurrent layers are made from."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "linear_num_heads", "linear_head_dim")

    linear_num_heads: Size
    linear_head_dim: Size
    linear_conv_kernel_dim: Size
    intermediate_size: Size
    num_attention_heads: Size
    rms_norm_eps: PositiveFloat
    layer_types: list[LayerType] | None

    @classmethod
    def by_present_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        inner = values.get("linear_attn_config")
        found = inner if isinstance(inner, dict) else {}  # transformers refuses anything else
        return values | {name: found[place] for name, place in IN_LINEAR_ATTN_CONFIG.items() if place in found}


class KimiLinearFamily(Family):
    """Kimi Linear, arXiv 2510.26692; merging: arXiv 2509.22630, section 3.

    Its mixer has one dimension for keys and values alike, so keys cannot grow alone. A merged head has one rate of
    writing and one decay rate in the place of several, so the old ones cannot be inherited, let alone the function be
    preserved.
    """

    model_type = "kimi_linear"
    fields: type[ConfigFields] = KimiLinearFields
    recurrence = "kimi_delta"
    mixer_path = "model.layers.{}.self_attn"
    norm_path = "model.layers.{}.input_layernorm"
    keys_last = False
    config_class = "transformers.models.kimi_linear.configuration_kimi_linear.KimiLinearConfig"
    model_class = f"{MODELING}.KimiLinearModel"
    causal_lm_class = f"{MODELING}.KimiLinearForCausalLM"
    mixer_class = f"{MODELING}.KimiLinearDeltaAttention"
    methods: ClassVar = {"reinit": (MERGE,)}
    merging_needs = ONE_RATE
    grows = "heads are merged"
    factors = "divisors of the number of heads; 4, 3 or 2, whichever is one first, where none is given"

    def check(self, config: Any) -> None:
        require_silu(config, "hidden_act")

    def recurrent_layers(self, config: Any) -> list[int]:
        return layers_of_types(config, "linear_attention")

    def geometry(self, config: Any) -> StateGeometry:
        return StateGeometry(config.linear_num_heads, config.linear_head_dim, config.linear_head_dim)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        layer_config = copy.copy(config)
        layer_config.linear_num_heads, layer_config.linear_head_dim = geometry.num_heads, geometry.key_dim
        return mixer_class(layer_config, layer_idx)

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        raise AssertionError("expanded_geometry refuses to inherit")

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        raise AssertionError("expanded_geometry refuses to preserve")
