"""Bailing hybrid, the architecture of Ling 3.0: Kimi Delta Attention among attention layers; heads are merged."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from statex.families.fields import ConfigFields, NegativeFloat, PositiveFloat, Size
from statex.families.gated_delta import LayerType
from statex.families.kimi_linear import KimiLinearFamily
from statex.families.shared import FURTHER_TOKENS

MODELING = "transformers.models.bailing_hybrid.modeling_bailing_hybrid"
Count = Annotated[int, Field(ge=0, lt=2**31)]


class BailingHybridFields(ConfigFields):
    """Fields of a Bailing hybrid configuration that its recurrent layers are made from."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "num_attention_heads", "intermediate_size")

    num_attention_heads: Size
    head_dim: Size
    short_conv_kernel_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    layer_group_size: Size
    kda_lower_bound: NegativeFloat
    rms_norm_eps: PositiveFloat
    layer_types: list[LayerType] | None
    num_mtp_layers: Count
    num_nextn_predict_layers: Count = 0


class BailingHybridFamily(KimiLinearFamily):
    """Ling 3.0 (inclusionAI, 2026), whose recurrent layers are Kimi Delta Attention, arXiv 2510.26692."""

    model_type = "bailing_hybrid"
    fields = BailingHybridFields
    config_class = "transformers.models.bailing_hybrid.configuration_bailing_hybrid.BailingHybridConfig"
    model_class = f"{MODELING}.BailingHybridModel"
    causal_lm_class = f"{MODELING}.BailingHybridForCausalLM"
    mixer_class = f"{MODELING}.BailingHybridDeltaAttention"
    left_out = FURTHER_TOKENS

    def num_layers_left_out(self, values: Mapping[str, Any]) -> int:
        return values.get("num_nextn_predict_layers", values["num_mtp_layers"])  # Ling's name of it first
