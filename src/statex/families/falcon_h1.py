"""Falcon-H1: attention and a Mamba2 mixer side by side in every layer."""

import copy
from importlib import import_module
from typing import Any

from torch import nn

from statex.errors import UserError
from statex.families.bamba import BambaFields
from statex.families.fields import Size
from statex.families.mamba2_type import Mamba2TypeFamily

MODELING = "transformers.models.falcon_h1.modeling_falcon_h1"


class FalconH1Fields(BambaFields):
    """Fields of a Falcon-H1 configuration."""

    mamba_d_ssm: Size | None


class FalconH1Family(Mamba2TypeFamily):
    """Falcon-H1, arXiv 2507.22448.

    The norm before the mixer feeds attention too, so that a re-initialisation leaves it alone. The multipliers of the
    projection's outputs are a buffer as long as those outputs, which no checkpoint holds.
    """

    model_type = "falcon_h1"
    fields = FalconH1Fields
    mixer_path = "model.layers.{}.mamba"
    norm_path = ""
    config_class = "transformers.models.falcon_h1.configuration_falcon_h1.FalconH1Config"
    model_class = f"{MODELING}.FalconH1Model"
    causal_lm_class = f"{MODELING}.FalconH1ForCausalLM"
    mixer_class = f"{MODELING}.FalconH1Mixer"
    time_steps = "dt_bias"
    begins_with_small_filters = True
    norm_classes = (f"{MODELING}.FalconH1RMSNormGated",)

    def check(self, config: Any) -> None:
        super().check(config)
        if tuple(config.time_step_limit) != (0.0, float("inf")):
            problem = "is not applied to single steps of generation, whose time steps have a multiplier"
            raise UserError("time_step_limit", config.time_step_limit, problem, "use a model without such a limit")

    def fill_buffers(self, config: Any, module: nn.Module) -> None:
        modeling = import_module(MODELING)
        if isinstance(module, modeling.FalconH1Mixer):
            layer_config: Any = copy.copy(config)
            layer_config.mamba_d_state = module.ssm_state_size
            weight = module.in_proj.weight
            vector = modeling.compute_mup_vector(layer_config).to(weight.device, weight.dtype)
            module.register_buffer("mup_vector", vector, persistent=False)
