"""Jamba: Mamba layers with norms on B, C and the time step's input, among attention layers and experts."""

from typing import Any, ClassVar, Literal

from statex.families.base import Segment, StateGeometry, TensorRows
from statex.families.fields import ConfigFields, PositiveFloat, Size
from statex.families.mamba_type import MambaTypeFamily, decays
from statex.families.shared import INHERIT_NOISE, refuse_rank

MODELING = "transformers.models.jamba.modeling_jamba"


class JambaFields(ConfigFields):
    """Fields of a Jamba configuration."""

    tensor_sizes: ClassVar = (*ConfigFields.tensor_sizes, "mamba_d_state", "mamba_d_conv")

    mamba_d_state: Size
    mamba_d_conv: Size
    mamba_expand: Size
    mamba_dt_rank: Size | Literal["auto"]
    num_attention_heads: Size
    num_key_value_heads: Size | None
    intermediate_size: Size
    rms_norm_eps: PositiveFloat
    attn_layer_period: Size
    expert_layer_period: Size


class JambaFamily(MambaTypeFamily):
    """Jamba, arXiv 2403.19887."""

    model_type = "jamba"
    fields = JambaFields
    state_size_field = "mamba_d_state"
    mixer_path = "model.layers.{}.mamba"
    norm_path = "model.layers.{}.input_layernorm"
    time_steps = "dt_proj.bias"
    begins_with_small_filters = True
    config_class = "transformers.models.jamba.configuration_jamba.JambaConfig"
    model_class = f"{MODELING}.JambaModel"
    causal_lm_class = f"{MODELING}.JambaForCausalLM"
    mixer_class = f"{MODELING}.JambaMambaMixer"
    norm_classes = (f"{MODELING}.JambaRMSNorm",)

    def inner_size(self, config: Any) -> int:
        return config.mamba_expand * config.hidden_size

    def time_step_rank(self, config: Any) -> int:
        return config.mamba_dt_rank

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # As Mamba's, but the factor goes into the norms' weights, for the norms undo one of the projection
        weight = _norm_weights(before, after, "copy", scale=(before.key_dim / after.key_dim) ** 0.5)
        return {
            "x_proj.weight": self.b_and_c(config, before, after, "copy", "copy", noise=INHERIT_NOISE),
            "b_layernorm.weight": weight,
            "c_layernorm.weight": weight,
            "A_log": decays(before, after, "copy"),
        }

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        refuse_rank(rank)
        # Copies leave the root mean square of B and of C as it was. The norm's weight of new C is 0: they read nothing
        # yet; they differ from the old ones by their decays.
        return {
            "x_proj.weight": self.b_and_c(config, before, after, "copy", "copy"),
            "b_layernorm.weight": _norm_weights(before, after, "fresh"),
            "c_layernorm.weight": _norm_weights(before, after, "zero"),
            "A_log": decays(before, after, "fresh"),
        }


def _norm_weights(before: StateGeometry, after: StateGeometry, fill: Any, scale: float = 1.0) -> TensorRows:
    return TensorRows((Segment("channels", 1, before.key_dim, after.key_dim, fill=fill, scale=scale),))
