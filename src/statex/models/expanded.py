"""The public `expand` and `reinitialize`: plan, operate, and make the model one that describes itself."""

import math
from typing import Any

from torch import nn

from statex.errors import UserError
from statex.expansion.config import ExpansionConfig
from statex.expansion.edits import ExpansionPlan
from statex.expansion.plan import plan_expansion, plan_reinitialization
from statex.expansion.surgery import apply_plan, unchanged_on_error
from statex.families import FAMILIES
from statex.models.factory import expanded_model_classes
from statex.models.registration import register_families
from statex.models.replay import ReplayExpansion
from statex.utils.environment import host_memory


def expand(model: nn.Module, config: ExpansionConfig | None = None, **fields: Any) -> ExpansionPlan:
    """Enlarge the recurrent state of some layers of a pre-trained model, in place (arXiv 2509.22630).

    Args:
        model: a causal language model of a known family (`statex.FAMILIES`), on any device, the meta device included.
        config: what to expand; or its fields as keywords, for example `expand(model, every=6, init="reinit")`.

    Returns:
        The plan that was carried out. It is stored in `model.config`, after those of earlier expansions, so that
        `save_pretrained` and `AutoModelForCausalLM.from_pretrained` (after `import statex`) need nothing else. A
        parameter that was frozen (`requires_grad`) stays frozen under its name, whatever its new contents.

    Raises:
        UserError: unknown family, layer out of range, factor that does not fit, a layer expanded before that cannot be
            expanded further, fields out of range, or mixers that are larger than the memory; or a model that cannot be
            changed in place: inside a wrapper (adapters, compiled code, parallel training), quantised, partly on disk,
            with hooks on a mixer that is replaced, or of a class of the user's own that cannot hold an expanded state.
            Whatever fails, the model is unchanged.
    """
    if config is not None and fields:
        raise UserError("config", config, "excludes further fields", "give an ExpansionConfig or its fields, not both")
    if config is not None and not isinstance(config, ExpansionConfig):
        raise UserError(
            "config", config, "is not an ExpansionConfig", "give one, or its fields, as in expand(model, every=6)"
        )
    plan = plan_expansion(model, config or ExpansionConfig(**fields))
    _require_memory(model, plan)
    register_families()
    with unchanged_on_error(model):
        apply_plan(model, plan)
        if isinstance(model, ReplayExpansion):
            model.exchange_classes()
        else:
            expanded_model_classes(FAMILIES[plan.model_type]).causal_lm.adopt(model)
    return plan


def reinitialize(model: nn.Module, layers: list[int], seed: int = 0) -> ExpansionPlan:
    """The control of an expansion: the same token mixers made fresh, in place, their state not enlarged.

    Args:
        model: as for `expand`.
        layers: indices of the layers.
        seed: of the fresh parameters; an expansion with `init="reinit"` and the same seed draws from the same stream.

    Returns:
        The plan, also recorded in `model.config`.

    Raises:
        UserError: as `expand`.
    """
    plan = plan_reinitialization(model, layers, seed)
    with unchanged_on_error(model):
        apply_plan(model, plan)
        if isinstance(model, ReplayExpansion):
            model.exchange_classes()
    return plan


def _require_memory(model: nn.Module, plan: ExpansionPlan) -> None:
    """Refuse an expansion whose mixers, which are made in fp32 on the CPU, are larger than its memory."""
    needed = 4 * sum(math.prod(edit.after) for layer in plan.layers for edit in layer.tensors)
    there = host_memory()
    if needed > there and any(not parameter.is_meta for parameter in model.parameters()):
        problem = f"makes mixers of {needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB of memory"
        raise UserError("factor", plan.factor, problem, "lower it (or rank), or expand fewer layers")
