"""Mamba, the first."""

from typing import ClassVar, Literal

from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba_type import MambaTypeFamily

MODELING = "transformers.models.mamba.modeling_mamba"


class MambaFields(ConfigFields):
    """Fields of a Mamba configuration; Falcon-Mamba's has them too."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "state_size", "conv_kernel")

    state_size: Size
    conv_kernel: Size
    expand: Size
    time_step_rank: Size | Literal["auto"]
    layer_norm_epsilon: PositiveFloat
    time_step_min: PositiveFloat
    time_step_max: PositiveFloat
    time_step_floor: PositiveFloat


class MambaFamily(MambaTypeFamily):
    """Mamba, arXiv 2312.00752."""

    model_type = "mamba"
    fields = MambaFields
    state_size_field = "state_size"
    mixer_path = "backbone.layers.{}.mixer"
    norm_path = "backbone.layers.{}.norm"
    config_class = "transformers.models.mamba.configuration_mamba.MambaConfig"
    model_class = f"{MODELING}.MambaModel"
    causal_lm_class = f"{MODELING}.MambaForCausalLM"
    mixer_class = f"{MODELING}.MambaMixer"
    norm_classes = (f"{MODELING}.MambaRMSNorm",)
    blocks_compile = True
