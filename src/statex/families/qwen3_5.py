"""Qwen3.5, its language model alone: layers of the gated delta rule among attention layers."""

from typing import Any

from statex.families.base import Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import Size
from statex.families.gated_delta import GatedDeltaFamily, GatedDeltaFields, num_key_heads
from statex.families.shared import FURTHER_TOKENS

MODELING = "transformers.models.qwen3_5.modeling_qwen3_5"


class Qwen35Fields(GatedDeltaFields):
    """Fields of the configuration of Qwen3.5's language model."""

    head_dim: Size


class Qwen35Family(GatedDeltaFamily):
    """Qwen3.5 (Qwen team, 2026), whose recurrent layers are Gated DeltaNet's, arXiv 2412.06464."""

    model_type = "qwen3_5_text"
    fields = Qwen35Fields
    config_class = "transformers.models.qwen3_5.configuration_qwen3_5.Qwen3_5TextConfig"
    model_class = f"{MODELING}.Qwen3_5TextModel"
    causal_lm_class = f"{MODELING}.Qwen3_5ForCausalLM"
    composite = "qwen3_5"
    left_out = f"what reads images, and {FURTHER_TOKENS}"
    mixer_class = f"{MODELING}.Qwen3_5GatedDeltaNet"
    time_steps = "dt_bias"
    norm_classes = (f"{MODELING}.Qwen3_5RMSNormGated",)
    blocks_compile = True

    def _projections(
        self, config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float
    ) -> dict[str, TensorRows]:
        sizes = num_key_heads(config, before), before.key_dim, after.key_dim
        num_values = before.num_heads * before.value_dim
        segments = (
            Segment("q", *sizes, fill=queries, noise=noise),
            Segment("k", *sizes, fill=keys, noise=noise),
            Segment("v", 1, num_values, num_values),
        )
        return {"in_proj_qkv.weight": TensorRows(segments)}
