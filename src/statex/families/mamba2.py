"""Mamba2."""

from typing import Any, ClassVar

from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba2_type import ChunkSize, Mamba2Names, Mamba2TypeFamily, Mamba2TypeFields

MODELING = "transformers.models.mamba2.modeling_mamba2"


class Mamba2Fields(Mamba2TypeFields):
    """Fields of a Mamba2 configuration."""

    names = Mamba2Names("num_heads", "head_dim", "state_size", "n_groups", "hidden_act")
    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "num_heads", "head_dim", "state_size", "n_groups", "conv_kernel",
    )  # fmt: skip

    num_heads: Size
    head_dim: Size
    state_size: Size
    n_groups: Size
    conv_kernel: Size
    expand: Size
    chunk_size: ChunkSize
    layer_norm_epsilon: PositiveFloat
    time_step_min: PositiveFloat
    time_step_max: PositiveFloat
    time_step_floor: PositiveFloat
    time_step_limit: Any


class Mamba2Family(Mamba2TypeFamily):
    """Mamba2, arXiv 2405.21060."""

    model_type = "mamba2"
    fields = Mamba2Fields
    mixer_path = "backbone.layers.{}.mixer"
    norm_path = "backbone.layers.{}.norm"
    measured = (
        "recall, text and cost ([CPU study](results/cpu-study/report.md)), "
        "[generation](results/generation.md) and [kernels](results/kernels.md) on an H200"
    )
    blocks_compile = True
    compiled_by_default = True
    config_class = "transformers.models.mamba2.configuration_mamba2.Mamba2Config"
    model_class = f"{MODELING}.Mamba2Model"
    causal_lm_class = f"{MODELING}.Mamba2ForCausalLM"
    mixer_class = f"{MODELING}.Mamba2Mixer"
    norm_classes = (f"{MODELING}.Mamba2RMSNorm", f"{MODELING}.MambaRMSNormGated")

    def recurrent_layers(self, config: Any) -> list[int]:
        return list(range(config.num_hidden_layers))
