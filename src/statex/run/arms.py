"""What an arm of a recipe does to a model: what it would change, and the change itself."""

from typing import Any

from statex.errors import explained
from statex.expansion.config import ExpansionConfig
from statex.recipe import Arm

CHANGED_KINDS = ("statex", "control")
"""The kinds of arms whose mixers are changed before training."""


def plan_of_arm(network: Any, arm: Arm) -> Any:
    """The plan of an arm of kind statex or control, for a model on the meta device."""
    from statex.expansion.plan import plan_expansion, plan_reinitialization, select_layers
    from statex.families import family_of

    expansion = arm.expansion or ExpansionConfig()
    recurrent = family_of(network.config).recurrent_layers(network.config)
    with explained("factor", expansion.factor, "cannot be planned", "correct the expansion"):
        if arm.kind == "statex":
            return plan_expansion(network, expansion)
        return plan_reinitialization(network, select_layers(recurrent, expansion))


def change_by_arm(arm: Arm, network: Any, one_layer: bool = False) -> None:
    """Apply the change of an arm of kind statex or control to a model; with `one_layer`, to layer 0, its only one."""
    from statex.expansion.plan import select_layers
    from statex.families import family_of
    from statex.models.expanded import expand, reinitialize

    expansion = arm.expansion or ExpansionConfig()
    if one_layer:
        expansion = expansion.model_copy(update={"layers": None, "num_layers": None, "every": 1})
    if arm.kind == "statex":
        expand(network, expansion)
    else:
        recurrent = family_of(network.config).recurrent_layers(network.config)
        reinitialize(network, select_layers(recurrent, expansion), expansion.seed)
