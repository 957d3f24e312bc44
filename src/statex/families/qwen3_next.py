"""Qwen3-Next: layers of the gated delta rule among attention layers, with a mixture of experts behind each.

Letters: G key heads, K and V key and value dimension of a head, R value heads of a key head.
"""

from typing import Annotated, Any

from pydantic import Field

from statex.families.base import Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import Size
from statex.families.gated_delta import GatedDeltaFamily, GatedDeltaFields, num_key_heads
from statex.families.shared import FURTHER_TOKENS

MODELING = "transformers.models.qwen3_next.modeling_qwen3_next"


class Qwen3NextFields(GatedDeltaFields):
    """Fields of a Qwen3-Next configuration."""

    head_dim: Size
    num_experts: Annotated[int, Field(ge=0, lt=2**31)]
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Size
    decoder_sparse_step: Size


class Qwen3NextFamily(GatedDeltaFamily):
    """Qwen3-Next (Qwen team, 2025), whose recurrent layers are Gated DeltaNet's, arXiv 2412.06464."""

    model_type = "qwen3_next"
    fields = Qwen3NextFields
    config_class = "transformers.models.qwen3_next.configuration_qwen3_next.Qwen3NextConfig"
    model_class = f"{MODELING}.Qwen3NextModel"
    causal_lm_class = f"{MODELING}.Qwen3NextForCausalLM"
    left_out = FURTHER_TOKENS
    mixer_class = f"{MODELING}.Qwen3NextGatedDeltaNet"
    time_steps = "dt_bias"
    measured = "nothing of it yet: small ones did not learn recall ([what was tried](results/families.md))"
    norm_classes = (f"{MODELING}.Qwen3NextRMSNormGated",)

    def _projections(
        self, config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float
    ) -> dict[str, TensorRows]:
        G = num_key_heads(config, before)
        num_values = before.num_heads // G * before.value_dim
        of_a_key_head = (
            Segment("q", 1, before.key_dim, after.key_dim, fill=queries, noise=noise),
            Segment("k", 1, before.key_dim, after.key_dim, fill=keys, noise=noise),
            Segment("v and z", 1, 2 * num_values, 2 * num_values),
        )
        return {"in_proj_qkvz.weight": TensorRows(G * of_a_key_head)}
