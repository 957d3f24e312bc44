"""Falcon-Mamba: Mamba with norms, without weights, on B, C and the time step's input."""

from typing import Any, ClassVar

from statex.errors import UserError
from statex.families.base import Segment, StateGeometry, TensorRows
from statex.families.mamba import MambaFields
from statex.families.mamba_type import MambaTypeFamily, decays
from statex.families.shared import INHERIT_NOISE

MODELING = "transformers.models.falcon_mamba.modeling_falcon_mamba"


class FalconMambaFields(MambaFields):
    """Fields of a Falcon-Mamba configuration."""

    mixer_rms_eps: float


class FalconMambaFamily(MambaTypeFamily):
    """Falcon-Mamba, arXiv 2410.05355."""

    model_type = "falcon_mamba"
    fields = FalconMambaFields
    state_size_field = "state_size"
    mixer_options: ClassVar = {"initialize_mixer_weights": False}  # transformers' would fail, its norms not being there
    mixer_path = "backbone.layers.{}.mixer"
    norm_path = "backbone.layers.{}.norm"
    config_class = "transformers.models.falcon_mamba.configuration_falcon_mamba.FalconMambaConfig"
    model_class = f"{MODELING}.FalconMambaModel"
    causal_lm_class = f"{MODELING}.FalconMambaForCausalLM"
    mixer_class = f"{MODELING}.FalconMambaMixer"
    norm_classes = (f"{MODELING}.FalconMambaRMSNorm",)
    blocks_compile = True

    def inherited_rows(self, config: Any, before: StateGeometry, after: StateGeometry) -> dict[str, TensorRows]:
        # The norms undo any scale of B and C, so that what is read becomes f times as large: the skip is made so, too,
        # and the output projection takes the factor out again
        f, V = after.key_dim / before.key_dim, before.value_dim
        return {
            "x_proj.weight": self.b_and_c(config, before, after, "copy", "copy", noise=INHERIT_NOISE),
            "A_log": decays(before, after, "copy"),
            "D": TensorRows((Segment("skip", 1, V, V, scale=f),)),
            "out_proj.weight": TensorRows((Segment("values", 1, V, V, scale=1 / f),), dim=1),
        }

    def preserving_rows(
        self, config: Any, before: StateGeometry, after: StateGeometry, rank: int | None
    ) -> dict[str, TensorRows]:
        # B and C are divided by their root mean square over all channels. For the old channels to stay as they are, the
        # new ones must have the same mean square for any input, as only copies have, in B and in C: and copies read
        # what they write, with the weight of the old.
        problem = (
            "would change the old channels of B and C: their norms, which have no weights that could make up for it, "
            "see the new ones"
        )
        raise UserError("init", "preserve", problem, 'use init = "inherit" or "reinit"')
