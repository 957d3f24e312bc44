"""Granite 4: Mamba2 layers among attention layers, each with experts, a shared feed-forward part, or both."""

from typing import Annotated

from pydantic import Field

from statex.families.bamba import BambaFields
from statex.families.fields import Size
from statex.families.mamba2_type import Mamba2TypeFamily

MODELING = "transformers.models.granitemoehybrid.modeling_granitemoehybrid"


class GraniteMoeHybridFields(BambaFields):
    """Fields of a Granite 4 configuration."""

    shared_intermediate_size: Size
    num_local_experts: Annotated[int, Field(ge=0, lt=2**31)] | None
    num_experts_per_tok: Annotated[int, Field(ge=0, lt=2**31)] | None


class GraniteMoeHybridFamily(Mamba2TypeFamily):
    """Granite 4.0 (IBM, 2025)."""

    model_type = "granitemoehybrid"
    fields = GraniteMoeHybridFields
    mixer_path = "model.layers.{}.mamba"
    norm_path = "model.layers.{}.input_layernorm"
    config_class = "transformers.models.granitemoehybrid.configuration_granitemoehybrid.GraniteMoeHybridConfig"
    model_class = f"{MODELING}.GraniteMoeHybridModel"
    causal_lm_class = f"{MODELING}.GraniteMoeHybridForCausalLM"
    mixer_class = f"{MODELING}.GraniteMoeHybridMambaLayer"
    time_steps = "dt_bias"
    measured = "nothing of it yet: small ones did not learn recall ([what was tried](results/families.md))"
    begins_with_small_filters = True
    norm_classes = (f"{MODELING}.GraniteMoeHybridRMSNormGated",)
