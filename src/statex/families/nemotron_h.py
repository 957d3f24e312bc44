"""Nemotron-H: each layer is a Mamba2 mixer, attention, a feed-forward part, or experts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba2_type import ChunkSize, Mamba2Names, Mamba2TypeFamily, Mamba2TypeFields
from statex.families.shared import FURTHER_TOKENS

MODELING = "transformers.models.nemotron_h.modeling_nemotron_h"
EARLIER_NAMES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_chunk_size": "chunk_size",
}
"""Under which names transformers takes some fields, too."""


class NemotronHFields(Mamba2TypeFields):
    """Fields of a Nemotron-H configuration; its number of layers follows from the list or pattern of their kinds."""

    names = Mamba2Names("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "mamba_hidden_act")
    tensor_sizes: ClassVar = (
        *ConfigFields.tensor_sizes, "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel",
    )  # fmt: skip

    num_hidden_layers: Any = None
    hybrid_override_pattern: str | None = None
    mtp_hybrid_override_pattern: str | None = None
    mamba_num_heads: Size
    mamba_head_dim: Size
    ssm_state_size: Size
    n_groups: Size
    conv_kernel: Size
    chunk_size: ChunkSize
    num_attention_heads: Size
    num_key_value_heads: Size | None
    layer_norm_epsilon: PositiveFloat
    time_step_min: PositiveFloat
    time_step_max: PositiveFloat
    time_step_floor: PositiveFloat

    @classmethod
    def by_present_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        return values | {new: values[old] for old, new in EARLIER_NAMES.items() if old in values}


class NemotronHFamily(Mamba2TypeFamily):
    """Nemotron-H, arXiv 2504.03624, and Nemotron 3."""

    model_type = "nemotron_h"
    fields = NemotronHFields
    mixer_path = "model.layers.{}.mixer"
    norm_path = "model.layers.{}.norm"
    config_class = "transformers.models.nemotron_h.configuration_nemotron_h.NemotronHConfig"
    model_class = f"{MODELING}.NemotronHModel"
    causal_lm_class = f"{MODELING}.NemotronHForCausalLM"
    left_out = FURTHER_TOKENS
    mixer_class = f"{MODELING}.NemotronHMamba2Mixer"
    begins_with_small_filters = True
    measured = "recall and text of a tiny one, one seed ([results](results/families.md))"
    norm_classes = (f"{MODELING}.NemotronHRMSNormGated",)

    def num_layers(self, values: Mapping[str, Any]) -> Any:
        kinds = values.get("layers_block_type") or values.get("layer_types") or values.get("hybrid_override_pattern")
        return len(kinds) if isinstance(kinds, list | str) else 4  # transformers' own default
