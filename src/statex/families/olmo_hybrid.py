"""OLMo Hybrid: layers of the gated delta rule, with negative eigenvalues, among attention layers."""

from typing import Annotated, Any

from pydantic import Field

from statex.families.base import Fill, Segment, StateGeometry, TensorRows
from statex.families.fields import PositiveFloat, Size
from statex.families.gated_delta import GatedDeltaFamily, GatedDeltaFields, num_key_heads
from statex.families.shared import FURTHER_TOKENS

MODELING = "transformers.models.olmo_hybrid.modeling_olmo_hybrid"


class OlmoHybridFields(GatedDeltaFields):
    """Fields of an OLMo Hybrid configuration, which works out what is null."""

    linear_num_key_heads: Size | None  # type: ignore[assignment]
    linear_num_value_heads: Size | None  # type: ignore[assignment]
    linear_key_head_dim: Size | None  # type: ignore[assignment]
    linear_value_head_dim: Size | None  # type: ignore[assignment]
    linear_a_log_min: Annotated[float, Field(ge=0)]
    linear_a_log_max: PositiveFloat
    linear_dt_min: PositiveFloat
    linear_dt_max: PositiveFloat
    linear_dt_init_floor: PositiveFloat


class OlmoHybridFamily(GatedDeltaFamily):
    """OLMo Hybrid (Ai2, 2026), whose recurrent layers are Gated DeltaNet's, arXiv 2412.06464, with beta up to 2."""

    model_type = "olmo_hybrid"
    fields = OlmoHybridFields
    config_class = "transformers.models.olmo_hybrid.configuration_olmo_hybrid.OlmoHybridConfig"
    model_class = f"{MODELING}.OlmoHybridModel"
    causal_lm_class = f"{MODELING}.OlmoHybridForCausalLM"
    left_out = FURTHER_TOKENS
    mixer_class = f"{MODELING}.OlmoHybridGatedDeltaNet"
    norm_classes = (f"{MODELING}.OlmoHybridRMSNormGated",)
    blocks_compile = True

    def _projections(
        self, config: Any, before: StateGeometry, after: StateGeometry, queries: Fill, keys: Fill, noise: float
    ) -> dict[str, TensorRows]:
        sizes = num_key_heads(config, before), before.key_dim, after.key_dim
        return {
            "q_proj.weight": TensorRows((Segment("q", *sizes, fill=queries, noise=noise),)),
            "k_proj.weight": TensorRows((Segment("k", *sizes, fill=keys, noise=noise),)),
        }
