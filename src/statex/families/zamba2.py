"""Zamba2: a Mamba2 mixer in every layer, behind attention blocks that layers share in some."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba2_type import ChunkSize, Mamba2Names, Mamba2TypeFamily, Mamba2TypeFields

MODELING = "transformers.models.zamba2.modeling_zamba2"


class Zamba2Fields(Mamba2TypeFields):
    """Fields of a Zamba2 configuration."""

    names = Mamba2Names("n_mamba_heads", "mamba_headdim", "mamba_d_state", "mamba_ngroups", None)
    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "n_mamba_heads", "mamba_d_state", "mamba_ngroups", "mamba_d_conv",
    )  # fmt: skip

    n_mamba_heads: Size
    mamba_d_state: Size
    mamba_ngroups: Size
    mamba_d_conv: Size
    mamba_expand: Size
    chunk_size: ChunkSize
    num_attention_heads: Size
    num_mem_blocks: Size
    rms_norm_eps: PositiveFloat
    time_step_min: PositiveFloat
    time_step_max: PositiveFloat
    time_step_floor: PositiveFloat

    @model_validator(mode="after")
    def _heads_fill_the_mixer(self):
        if self.mamba_expand * self.hidden_size % self.n_mamba_heads:
            problem = f"does not divide mamba_expand * hidden_size = {self.mamba_expand * self.hidden_size}"
            raise UserError("n_mamba_heads", self.n_mamba_heads, problem, "use a divisor")
        return self


class Zamba2Family(Mamba2TypeFamily):
    """Zamba2, arXiv 2411.15242.

    Every layer has a mixer of its own; what layers share is attention, which is never expanded.
    """

    model_type = "zamba2"
    fields = Zamba2Fields
    mixer_path = "model.layers.{}.mamba"
    norm_path = "model.layers.{}.input_layernorm"
    config_class = "transformers.models.zamba2.configuration_zamba2.Zamba2Config"
    model_class = f"{MODELING}.Zamba2Model"
    causal_lm_class = f"{MODELING}.Zamba2ForCausalLM"
    mixer_class = f"{MODELING}.Zamba2MambaMixer"
    begins_with_small_filters = True
    norm_classes = (f"{MODELING}.Zamba2RMSNormGated",)

    def mixer_name(self, config: PreTrainedConfig, index: int) -> str:
        return f"{_decoder(config, index)}.mamba"

    def norm_name(self, config: PreTrainedConfig, index: int) -> str:
        return f"{_decoder(config, index)}.input_layernorm"

    def num_layers(self, values: Mapping[str, Any]) -> Any:
        kinds = values.get("layers_block_type") or values.get("layer_types")
        return len(kinds) if isinstance(kinds, list) else values["num_hidden_layers"]


def _decoder(config: Any, index: int) -> str:
    """Where a layer's Mamba2 part is: beside the shared attention block in a hybrid layer."""
    layer = f"model.layers.{index}"
    return f"{layer}.mamba_decoder" if config.layers_block_type[index] == "hybrid" else layer
