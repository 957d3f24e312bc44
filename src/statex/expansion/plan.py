"""Work out an expansion: every edit is listed before any tensor is touched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from statex.errors import UserError
from statex.expansion.config import ExpansionConfig
from statex.expansion.edits import ExpansionPlan, LayerEdit, TensorEdit
from statex.expansion.initializers import INITIALIZERS, RESETS_PRE_NORM
from statex.expansion.preconditions import require_expandable, require_mixer, require_no_hooks
from statex.expansion.stored import layer_shapes, stored_plan
from statex.families import Family, LayerShape, family_of


def plan_expansion(model_or_config: nn.Module | PreTrainedConfig, expansion: ExpansionConfig) -> ExpansionPlan:
    """Work out an expansion without touching anything; a configuration suffices, weights are not needed.

    A model that was expanded before is expanded further from its present state.

    Raises:
        UserError: unknown family, layer out of range, factor that does not fit, or a layer that was expanded before
            and cannot be expanded further.
    """
    model = model_of(model_or_config)
    family = family_of(model.config)
    family.check(model.config)
    shapes = layer_shapes(model.config)
    layers = select_layers(family.recurrent_layers(model.config), expansion)
    method = family.method_of(expansion.init, expansion.method)
    factor = expansion.factor if expansion.factor is not None else _default_factor(family, model.config, layers, method)
    edits = []
    for index in layers:
        before, rank = shapes[index]
        with _expanded_before(model.config, index):
            if rank is not None:
                problem = "gave its key dimensions low-rank projections, which cannot grow"
                raise UserError("rank", rank, problem, "leave the layer as it is")
            geometry = family.expanded_geometry(model.config, before, factor, expansion.init, method)
            after = LayerShape(geometry, expansion.rank)
            edits.append(_plan_layer(model, family, index, shapes[index], after, expansion.init))
    return ExpansionPlan("expand", family.model_type, expansion.init, factor, expansion.rank, expansion.seed, edits)


def plan_reinitialization(
    model_or_config: nn.Module | PreTrainedConfig, layers: list[int], seed: int = 0
) -> ExpansionPlan:
    """The control's plan: the same mixers made fresh, the state not enlarged.

    Raises:
        UserError: unknown family, or layer or seed out of range.
    """
    model = model_of(model_or_config)
    family = family_of(model.config)
    family.check(model.config)
    shapes = layer_shapes(model.config)
    if layers is None:
        raise UserError("layers", None, "names no layer", "give a list of indices, such as [0, 6]")
    chosen = ExpansionConfig(layers=layers, seed=seed)
    indices = select_layers(family.recurrent_layers(model.config), chosen)
    edits = [_plan_layer(model, family, index, shapes[index], shapes[index], "reinit") for index in indices]
    return ExpansionPlan("reinitialize", family.model_type, "reinit", 1, None, chosen.seed, edits)


def select_layers(recurrent: list[int], expansion: ExpansionConfig) -> list[int]:
    """Indices of the layers that an ExpansionConfig chooses among the recurrent ones.

    Raises:
        UserError: a layer that does not exist or has no matrix state, or more layers than there are.
    """
    known = f"the recurrent layers are {_ranges(recurrent)}"
    if expansion.layers is not None:
        for index in expansion.layers:
            if index not in recurrent:
                raise UserError("layers", index, "is not a recurrent layer of this model", known)
        return sorted(expansion.layers)
    if expansion.num_layers is not None:
        if expansion.num_layers > len(recurrent):
            raise UserError("num_layers", expansion.num_layers, "is more than the model has", known)
        return [recurrent[i * len(recurrent) // expansion.num_layers] for i in range(expansion.num_layers)]
    return recurrent[:: expansion.every or 6]


def _default_factor(family: Family, config: PreTrainedConfig, layers: list[int], method: str) -> int:
    shapes = layer_shapes(config)
    factors = {family.default_factor(config, shapes[index].geometry, method) for index in layers}
    if len(factors) > 1:
        problem = f"has no default: since an earlier expansion it would be one of {sorted(factors)}, layer by layer"
        raise UserError("factor", None, problem, "give a factor")
    return factors.pop()


@contextmanager
def _expanded_before(config: PreTrainedConfig, index: int) -> Iterator[None]:
    """Where there was an earlier expansion, report errors as a layer that cannot be expanded again after it."""
    try:
        yield
    except UserError as error:
        stored = stored_plan(config)
        if stored is None or index not in (layer.index for layer in stored.layers):
            raise
        problem = f"was expanded before and cannot be expanded again: {error.field} = {error.value!r} {error.problem}"
        raise UserError(
            "layers", index, problem, f"{error.remedy}, or start from the checkpoint before that"
        ) from error


def model_of(model_or_config: nn.Module | PreTrainedConfig) -> Any:
    """The model itself, or one on the meta device made from a configuration.

    Raises:
        UserError: a model that cannot be changed in place as it stands, or something that is not a model.
    """
    if isinstance(model_or_config, nn.Module):
        require_expandable(model_or_config)
        return model_or_config
    if not isinstance(model_or_config, PreTrainedConfig):
        remedy = "give a model that AutoModelForCausalLM or statex.load made"
        raise UserError("model", model_or_config, "is neither a model nor a configuration", remedy)
    family_of(model_or_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_or_config)


def _plan_layer(model: Any, family: Family, index: int, before: LayerShape, after: LayerShape, init: str) -> LayerEdit:
    prefix = family.mixer_name(model.config, index)
    mixer = model.get_submodule(prefix)
    require_no_hooks(prefix, mixer)
    with torch.device("meta"):
        require_mixer(mixer, family.build_mixer(type(mixer), model.config, index, *before))
        expanded = family.build_mixer(type(mixer), model.config, index, *after)
    edit_of = INITIALIZERS[init](family, model.config, before.geometry, after.geometry, after.rank)
    old_shapes = {name: list(tensor.shape) for name, tensor in mixer.named_parameters()}
    edits = [
        TensorEdit(f"{prefix}.{name}", old_shapes.get(name), list(tensor.shape), edit_of(name))
        for name, tensor in expanded.named_parameters()
    ]
    norm = family.norm_name(model.config, index)
    if init in RESETS_PRE_NORM and norm is not None:
        for name, tensor in model.get_submodule(norm).named_parameters():
            edits.append(TensorEdit(f"{norm}.{name}", list(tensor.shape), list(tensor.shape), "re-initialised"))
    assert all(edit.fits for edit in edits), "an edit does not make the shape of its tensor"
    return LayerEdit(index, before.geometry, after.geometry, edits)


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index == groups[-1][1] + 1:
            groups[-1][1] = index
        else:
            groups.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in groups)
