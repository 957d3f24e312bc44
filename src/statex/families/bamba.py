"""Bamba: Mamba2 layers among attention layers; and the names that other families share with it."""

from typing import Any, ClassVar, Literal

from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba2_type import ChunkSize, Mamba2Names, Mamba2TypeFamily, Mamba2TypeFields

MODELING = "transformers.models.bamba.modeling_bamba"


class BambaFields(Mamba2TypeFields):
    """Fields of a Bamba configuration that its Mamba2 layers are made from; Granite's and Falcon-H1's have them too."""

    names = Mamba2Names("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "hidden_act")
    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv",
    )  # fmt: skip

    mamba_n_heads: Size
    mamba_d_head: Size | Literal["auto"]
    mamba_d_state: Size
    mamba_n_groups: Size
    mamba_d_conv: Size
    mamba_expand: Size
    mamba_chunk_size: ChunkSize
    num_attention_heads: Size
    num_key_value_heads: Size | None
    intermediate_size: Size
    rms_norm_eps: PositiveFloat
    time_step_limit: Any


class BambaFamily(Mamba2TypeFamily):
    """Bamba (IBM, Princeton, CMU, UIUC, 2024): https://github.com/foundation-model-stack/bamba."""

    model_type = "bamba"
    fields = BambaFields
    mixer_path = "model.layers.{}.mamba"
    norm_path = "model.layers.{}.input_layernorm"
    config_class = "transformers.models.bamba.configuration_bamba.BambaConfig"
    model_class = f"{MODELING}.BambaModel"
    causal_lm_class = f"{MODELING}.BambaForCausalLM"
    mixer_class = f"{MODELING}.BambaMixer"
    time_steps = "dt_bias"
    begins_with_small_filters = True
    norm_classes = (f"{MODELING}.BambaRMSNormGated",)
    blocks_compile = True
