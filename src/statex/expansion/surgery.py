"""Apply a plan to a model's tensors; build and fill all mixers first, then put them in."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from statex.expansion.edits import ExpansionPlan, LayerEdit
from statex.expansion.rows import grow
from statex.expansion.stored import layer_shapes, stored_plan
from statex.families import Family, LayerShape, TensorRows, family_of

LAYER_SEED_STRIDE = 1_000_003  # layers must not share their random numbers
STEP_SEED_STRIDE = 1_000_000_007  # nor must a layer's first and second expansion


def apply_plan(model: Any, plan: ExpansionPlan) -> None:
    """Edit the tensors of `model` in place exactly as the plan says, and add the plan to those in its configuration.

    Every tensor keeps its device and dtype, and tensors that were frozen (`requires_grad`) stay frozen under the same
    name, whatever their new contents; tensors with new names are trainable. On the meta device only shapes change.
    """
    family, earlier = family_of(model.config), stored_plan(model.config)
    steps = earlier.steps if earlier else []
    shapes = layer_shapes(model.config)
    mixers = {}
    for layer in plan.layers:
        shape = LayerShape(layer.after, plan.rank) if plan.kind == "expand" else shapes[layer.index]
        seed = plan.seed * LAYER_SEED_STRIDE + layer.index + len(steps) * STEP_SEED_STRIDE
        mixer = mixers[layer.index] = _edited_mixer(model, family, layer, shape, seed % 2**64)
        frozen = {name for name, old in _mixer(model, family, layer.index).named_parameters() if not old.requires_grad}
        for name, parameter in mixer.named_parameters():
            parameter.requires_grad_(name not in frozen)
    for layer in plan.layers:
        _reset_norm(model, family, layer)
    put_mixers(model, family, mixers)
    _own_config(model).expansion = [step.to_dict() for step in [*steps, plan]]


@torch.no_grad()
def _reset_norm(model: Any, family: Family, layer: LayerEdit) -> None:
    """Re-initialise, with the model's own initialisation, what the plan resets outside the mixer: its pre-norm."""
    mixer = f"{family.mixer_name(model.config, layer.index)}."
    for edit in layer.tensors:
        if not edit.name.startswith(mixer) and edit.edit == "re-initialised":
            path, _, leaf = edit.name.rpartition(".")
            fresh = copy.deepcopy(model.get_submodule(path))
            for parameter in fresh.parameters():  # a loaded one is marked so that it is not initialised again
                parameter.__dict__.pop("_is_hf_initialized", None)
            model._init_weights(fresh)
            is_trained = model.get_parameter(edit.name).requires_grad
            _set_parameter(model, edit.name, fresh.get_parameter(leaf).detach())
            model.get_parameter(edit.name).requires_grad_(is_trained)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Inside this context, a failure leaves each module of it with its class, submodules, tensors and attributes.

    This covers tensors that are replaced, not tensors that are written to.
    """
    before = [
        (module, type(module), dict(vars(module)), dict(module._modules), dict(module._parameters))
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, cls, attributes, modules, parameters in before:
            module.__class__ = cls
            pairs: Any = (vars(module), attributes), (module._modules, modules), (module._parameters, parameters)
            for own, old in pairs:
                own.clear()
                own.update(old)
        raise


def _own_config(model: Any) -> Any:
    """Give the model a configuration that no other model shares, in every module that holds it."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


def replay_plan(model: Any) -> None:
    """Give a model under construction the shapes that its stored plan gave it; the weights are loaded afterwards.

    Args:
        model: a language model, or its base model.
    """
    family = family_of(model.config)
    original = LayerShape(family.geometry(model.config))
    mixers = {
        index: family.build_mixer(type(_mixer(model, family, index)), model.config, index, *shape)
        for index, shape in layer_shapes(model.config).items()
        if shape != original
    }
    put_mixers(model, family, mixers)


def put_mixers(model: Any, family: Family, mixers: dict[int, nn.Module]) -> None:
    """Replace the mixers of some layers."""
    for index, mixer in mixers.items():
        mixer.train(model.training)
        model.set_submodule(_mixer_path(model, family, index), mixer)


def _mixer(model: Any, family: Family, index: int) -> nn.Module:
    return model.get_submodule(_mixer_path(model, family, index))


def _mixer_path(model: Any, family: Family, index: int) -> str:
    """Where a layer's mixer is, seen from a language model or from its base model."""
    path = family.mixer_name(model.config, index)
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else path


@torch.no_grad()
def _edited_mixer(model: Any, family: Family, layer: LayerEdit, shape: LayerShape, seed: int) -> nn.Module:
    """A mixer as planned, filled from the old one on the CPU; fresh values are drawn in fp32."""
    old = _mixer(model, family, layer.index)
    device = next(old.parameters()).device
    if device.type == "meta":
        with torch.device("meta"):
            return family.build_mixer(type(old), model.config, layer.index, *shape)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device's, too
        new = family.build_mixer(type(old), model.config, layer.index, *shape).float()
        new.apply(model._init_weights)
        family.initialize_mixer(new)
    generator = torch.Generator().manual_seed(seed)
    edits = {edit.name: edit.edit for edit in layer.tensors}
    old_tensors = dict(old.named_parameters())
    mixer_dtype = next(old.parameters()).dtype
    for name, parameter in new.named_parameters():
        source, edit = old_tensors.get(name), edits[f"{family.mixer_name(model.config, layer.index)}.{name}"]
        dtype = source.dtype if source is not None else mixer_dtype
        if isinstance(edit, TensorRows):
            exact = torch.promote_types(dtype, torch.float32)  # old weights come through unrounded
            old_value = source.detach().cpu() if source is not None else None
            value = grow(old_value, parameter.detach().to(exact), edit, generator)
        elif edit == "re-initialised":
            value = parameter.detach()
        else:
            assert source is not None
            value = source.detach().clone()
        _set_parameter(new, name, value.to(device=device, dtype=dtype))
    family.fill_buffers(model.config, new)
    _take_buffers(old, new)
    return new.to(device=device)


def _take_buffers(old: nn.Module, new: nn.Module) -> None:
    """Keep the buffers that a checkpoint holds, and give those that have another shape the old ones' dtype."""
    saved = old.state_dict()
    for name, fresh in list(new.named_buffers()):
        if name in saved:
            path, _, leaf = name.rpartition(".")
            value = saved[name].clone() if saved[name].shape == fresh.shape else fresh.to(saved[name].dtype)
            setattr(new.get_submodule(path), leaf, value)


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value))
