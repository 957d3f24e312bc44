"""MiniMax: layers of lightning attention among attention layers. Their key dimension grows, or heads are merged.

Letters: H heads, K and V key and value dimension of a head, f factor.
"""

import copy
from typing import Any, ClassVar

from pydantic import model_validator
from torch import nn

from statex.errors import UserError
from statex.families.base import GROW, MERGE, Family, Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.gated_delta import LayerType
from statex.families.mamba2_type import ChunkSize
from statex.families.shared import (
    INHERIT_NOISE,
    ZERO_AT_ZERO,
    layers_of_types,
    refuse_rank,
    require_a_type_each,
)

MODELING = "transformers.models.minimax.modeling_minimax"


class MiniMaxFields(ConfigFields):
    """Fields of a MiniMax configuration."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "num_attention_heads", "head_dim", "intermediate_size")

    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    intermediate_size: Size
    num_local_experts: Size
    num_experts_per_tok: Size
    block_size: ChunkSize
    rms_norm_eps: PositiveFloat
    layer_types: list[LayerType] | None

    @model_validator(mode="after")
    def _layers_fit(self):
        require_a_type_each(self)
        return self


class MiniMaxFamily(Family):
    """MiniMax-01, arXiv 2501.08313, whose recurrent layers are lightning attention, arXiv 2401.04658.

    Each head decays at a rate that follows from its place among the layer's heads, and from the layer's among all
    layers: merged ones at the rates of a layer with so few.
    """

    model_type = "minimax"
    fields = MiniMaxFields
    recurrence = "lightning"
    mixer_path = "model.layers.{}.self_attn"
    norm_path = ""  # what it makes is added to the mixer's output, too
    keys_last = True
    config_class = "transformers.models.minimax.configuration_minimax.MiniMaxConfig"
    model_class = f"{MODELING}.MiniMaxModel"
    causal_lm_class = f"{MODELING}.MiniMaxForCausalLM"
    mixer_class = f"{MODELING}.MiniMaxLightningAttention"
    methods: ClassVar = {"reinit": (GROW, MERGE), "inherit": (GROW,), "preserve": (GROW,)}
    merging_needs = "would need one decay rate in the place of several heads' own"
    grows = 'key dimension, or with `method = "merge"` heads are merged'
    factors = (
        "2 and more; 4 where none is given. Of merging: divisors of the number of heads; 4, 3 or 2, whichever is one "
        "first"
    )

    def recurrent_layers(self, config: Any) -> list[int]:
        return layers_of_types(config, "linear_attention")

    def geometry(self, config: Any) -> StateGeometry:
        H = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // H
        return StateGeometry(H, head_dim, head_dim)

    def build_mixer(
        self, mixer_class: type[nn.Module], config: Any, layer_idx: int, geometry: StateGeometry, rank: int | None
    ) -> nn.Module:
        refuse_rank(rank)
        H, K, V = geometry.num_heads, geometry.key_dim, geometry.value_dim
        layer_config = copy.copy(config)
        layer_config.num_attention_heads, layer_config.head_dim = H, V
        mixer: Any = mixer_class(layer_config, layer_idx)
        if K != V:
            mixer.qkv_proj = nn.Linear(config.hidden_size, H * (2 * K + V), bias=False)
            mixer.key_dim = K
        return mixer

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # What is read becomes f times as large, in all heads alike, and the norm behind all of them takes it out again
        return _rows(before, after, "copy", "copy", INHERIT_NOISE)

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        if config.hidden_act not in ZERO_AT_ZERO:
            problem = f"the activation {config.hidden_act!r} is not 0 at 0, or has no slope there"
            raise UserError("init", "preserve", problem, 'use init = "reinit" or "inherit"')
        # New keys write, with the decay of the old ones; new queries are 0 and read nothing yet
        return _rows(before, after, "zero", "fresh")


def _rows(
    before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float = 0.0
) -> dict[str, TensorRows]:
    """The projection's rows, which lie head by head."""
    of_a_head = (
        Segment("q", 1, before.key_dim, after.key_dim, fill=queries, noise=noise),
        Segment("k", 1, before.key_dim, after.key_dim, fill=keys, noise=noise),
        Segment("v", 1, before.value_dim, after.value_dim),
    )
    return {"qkv_proj.weight": TensorRows(before.num_heads * of_a_head)}
