"""The plan in a model's configuration: read strictly, checked against the model, and the shapes it gives each layer."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.expansion.edits import RESTORE, ExpansionPlan, LayerEdit, StoredPlan
from statex.expansion.initializers import RESETS_PRE_NORM
from statex.expansion.version1 import read_version_1
from statex.families import Family, LayerShape, StateGeometry, family_of
from statex.families.base import GROW, MERGE


def stored_plan(config: PreTrainedConfig) -> StoredPlan | None:
    """The plan in a model's configuration, None where there is none.

    Raises:
        UserError: it is damaged, or cannot be a plan for this model.
    """
    values = getattr(config, "expansion", None)
    if values is None:
        return None
    if isinstance(values, dict):  # as the first version stored its only step
        plan = StoredPlan([read_version_1(values, config)])
    elif values:
        plan = StoredPlan([ExpansionPlan.from_dict(each, f"expansion.{i}") for i, each in enumerate(values)])
    else:
        raise UserError("expansion", values, "lists no expansion", RESTORE)
    family = family_of(config)
    shapes = _original_shapes(family, config)
    for step in plan.steps:
        _check_step(step, family, config, shapes)
        shapes |= _shapes_after(step, shapes)
    return plan


def layer_shapes(config: PreTrainedConfig) -> dict[int, LayerShape]:
    """The shape of each recurrent layer's mixer, by the configuration and its stored plan."""
    plan, shapes = stored_plan(config), _original_shapes(family_of(config), config)
    for step in plan.steps if plan else ():
        shapes |= _shapes_after(step, shapes)
    return shapes


def layer_geometry(config: PreTrainedConfig) -> dict[int, StateGeometry]:
    """State of each recurrent layer, by the configuration and its stored plan."""
    return {index: shape.geometry for index, shape in layer_shapes(config).items()}


def _original_shapes(family: Family, config: PreTrainedConfig) -> dict[int, LayerShape]:
    return dict.fromkeys(family.recurrent_layers(config), LayerShape(family.geometry(config)))


def _shapes_after(step: ExpansionPlan, shapes: dict[int, LayerShape]) -> dict[int, LayerShape]:
    """The shapes of the layers that a step edits; a re-initialisation leaves them as they were."""
    if step.kind == "reinitialize":
        return {layer.index: shapes[layer.index] for layer in step.layers}
    return {layer.index: LayerShape(layer.after, step.rank) for layer in step.layers}


def _check_step(plan: ExpansionPlan, family: Family, config: PreTrainedConfig, shapes: dict[int, LayerShape]) -> None:
    """Raise UserError unless the plan is what an expansion of layers of these shapes would be."""
    if plan.model_type != family.model_type:
        raise UserError("expansion.model_type", plan.model_type, f"is not {family.model_type}, the model's", RESTORE)
    indices = [layer.index for layer in plan.layers]
    for index in indices:
        if index not in shapes or indices.count(index) > 1:
            problem = "is there twice" if indices.count(index) > 1 else "is not a recurrent layer of this model"
            raise UserError("expansion.layers", index, problem, RESTORE)
    if plan.kind == "reinitialize" and (plan.init, plan.factor, plan.rank) != ("reinit", 1, None):
        raise UserError("expansion.kind", plan.kind, "does not go with its init, factor and rank", RESTORE)
    if plan.rank is not None and plan.init != "preserve":
        raise UserError("expansion.rank", plan.rank, f"does not go with init {plan.init!r}", RESTORE)
    for layer in plan.layers:
        before = after = shapes[layer.index].geometry
        if plan.kind == "expand":
            if (rank := shapes[layer.index].rank) is not None:
                raise UserError("expansion.layers", layer.index, f"was expanded with rank {rank} already", RESTORE)
            after = family.expanded_geometry(config, before, plan.factor, plan.init, _method(layer, plan, family))
        for name, geometry in (("before", before), ("after", after)):
            if (stored := getattr(layer, name)) != geometry:
                field = f"expansion.layers.{layer.index}.{name}"
                raise UserError(field, asdict(stored), f"is not the model's, {asdict(geometry)}", RESTORE)


def _method(layer: LayerEdit, plan: ExpansionPlan, family: Family) -> str | None:
    """How a layer was enlarged, which its heads tell; None where the family does not do so with this initialisation."""
    method = MERGE if layer.after.num_heads < layer.before.num_heads else GROW
    return method if method in family.methods.get(plan.init, ()) else None


def check_plan_tensors(model: Any, plan: StoredPlan) -> None:
    """Raise UserError unless the plan lists exactly the tensors of `model`, which has this plan, and their shapes."""
    family = family_of(model.config)
    shapes = _original_shapes(family, model.config)
    for step in plan.steps:
        after = _shapes_after(step, shapes)
        for layer in step.layers:
            stored = {edit.name: (edit.before, edit.after) for edit in layer.tensors}
            wanted = _tensors_of_step(model, family, layer.index, step.init, shapes[layer.index], after[layer.index])
            _compare(layer.index, stored, wanted, is_longer=len(layer.tensors) > len(stored))
        shapes |= after
    for change in plan.layers:
        mixer = family.mixer_name(model.config, change.index)
        parameters = model.get_submodule(mixer).named_parameters()
        actual = {f"{mixer}.{name}": (None, list(tensor.shape)) for name, tensor in parameters}
        now = {each.name: (None, each.after) for each in change.tensors if each.name.startswith(f"{mixer}.")}
        _compare(change.index, now, actual)


Shapes = Mapping[str, tuple[list[int] | None, list[int]]]
"""Of tensors by name, before and after."""


def _compare(index: int, stored: Shapes, wanted: Shapes, *, is_longer: bool = False) -> None:
    if stored != wanted or is_longer:
        names = (name for name in [*wanted, *stored] if stored.get(name) != wanted.get(name))
        wrong, field = next(names, "a tensor twice"), f"expansion.layers.{index}.tensors"
        raise UserError(field, stored.get(wrong), f"does not say what the model has for {wrong}", RESTORE)


def _tensors_of_step(
    model: Any, family: Family, index: int, init: str, before: LayerShape, after: LayerShape
) -> Shapes:
    """The tensors that a step edits in a layer."""
    mixer, norm = family.mixer_name(model.config, index), family.norm_name(model.config, index)
    mixer_class = type(model.get_submodule(mixer))
    with torch.device("meta"):
        old, new = (
            dict(family.build_mixer(mixer_class, model.config, index, *shape).named_parameters())
            for shape in (before, after)
        )
    tensors = {
        f"{mixer}.{name}": (list(old[name].shape) if name in old else None, list(tensor.shape))
        for name, tensor in new.items()
    }
    if init in RESETS_PRE_NORM and norm is not None:
        norms = model.get_submodule(norm).named_parameters()
        tensors |= {f"{norm}.{name}": (list(tensor.shape), list(tensor.shape)) for name, tensor in norms}
    return tensors
