"""Apply a plan to a model's tensors; build and fill all mixers first, then put them in."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from statex.expansion.initializers import INITIALIZERS, RESETS_PRE_NORM
from statex.expansion.plan import ExpansionPlan
from statex.expansion.rows import grow
from statex.families import Family, family_of

LAYER_SEED_STRIDE = 1_000_003  # layers must not share their random numbers


def apply_plan(model: Any, plan: ExpansionPlan) -> None:
    """Expand the mixers of `model` in place as the plan says, and store the plan in its configuration.

    The model keeps device and dtype of every tensor; on the meta device only shapes change.
    """
    family = family_of(model.config)
    mixers = {layer.index: _expanded_mixer(model, family, plan, layer.index) for layer in plan.layers}
    norms = [model.get_submodule(family.norm_path.format(i)) for i in mixers if plan.init in RESETS_PRE_NORM]
    for norm in norms:
        for name, parameter in list(norm.named_parameters()):
            _set_parameter(norm, name, torch.ones_like(parameter))
    put_mixers(model, family, mixers)
    _own_config(model).expansion = plan.to_dict()


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Within it, whatever fails leaves every module of the model with its class, submodules, tensors and attributes.

    Tensors must be exchanged and not written to.
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


def replay_plan(model: Any, plan: ExpansionPlan) -> None:
    """Give a model under construction the shapes of a stored plan; the weights are loaded afterwards.

    Args:
        model: a language model, or its base model.
        plan: an expansion.
    """
    family = family_of(model.config)
    mixers = {
        layer.index: family.build_mixer(
            type(_mixer(model, family, layer.index)), model.config, layer.index, layer.after, plan.rank
        )
        for layer in plan.layers
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
    path = family.mixer_path.format(index)
    return path.removeprefix(f"{model.base_model_prefix}.") if model.base_model is model else path


@torch.no_grad()
def _expanded_mixer(model: Any, family: Family, plan: ExpansionPlan, index: int) -> nn.Module:
    """A mixer of the planned size, filled from the old one on the CPU; fresh values are drawn in fp32."""
    old = _mixer(model, family, index)
    after = next(layer.after for layer in plan.layers if layer.index == index)
    device = next(old.parameters()).device
    if device.type == "meta":
        with torch.device("meta"):
            return family.build_mixer(type(old), model.config, index, after, plan.rank)
    seed = plan.seed * LAYER_SEED_STRIDE + index
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every other device's, too
        new = family.build_mixer(type(old), model.config, index, after, plan.rank).float()
        new.apply(model._init_weights)
    generator = torch.Generator().manual_seed(seed)
    start = INITIALIZERS[plan.init](family, model.config, after, plan.rank)
    old_tensors = dict(old.named_parameters())
    mixer_dtype = next(old.parameters()).dtype
    for name, parameter in new.named_parameters():
        source, how = old_tensors.get(name), start(name)
        dtype = source.dtype if source is not None else mixer_dtype
        if how == "keep":
            assert source is not None
            value = source.detach().clone()
        elif how == "fresh":
            value = parameter.detach()
        else:
            exact = torch.promote_types(dtype, torch.float32)  # old weights come through unrounded
            old_value = source.detach().cpu() if source is not None else None
            value = grow(old_value, parameter.detach().to(exact), how, generator)
        _set_parameter(new, name, value.to(device=device, dtype=dtype))
    return new.to(device=device)


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(value))
