"""What a model must be before its layers are replaced: complete, in plain tensors, of the family's own class."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from statex.errors import UserError
from statex.families import Family, family_of

PLAIN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FIRST_EXPAND = "expand the model as from_pretrained gives it, then"
WRAPPERS = {  # (package, class): what a module of that class says about the model, and what to do
    ("peft", "*"): ("has adapters", "merge them (`merge_and_unload()`), or expand the model before they are added"),
    ("deepspeed", "*"): ("is DeepSpeed's", f"{FIRST_EXPAND} hand it to DeepSpeed"),
    ("bitsandbytes", "*"): ("is quantised", f"{FIRST_EXPAND} quantise it"),
    ("torchao", "*"): ("is quantised", f"{FIRST_EXPAND} quantise it"),
    ("torch", "OptimizedModule"): ("is compiled", f"{FIRST_EXPAND} compile it (its model is `._orig_mod`)"),
    ("torch", "DistributedDataParallel"): ("is wrapped for parallel training", f"{FIRST_EXPAND} wrap it"),
    ("torch", "DataParallel"): ("is wrapped for parallel training", f"{FIRST_EXPAND} wrap it"),
    ("torch", "FullyShardedDataParallel"): ("is sharded for parallel training", f"{FIRST_EXPAND} shard it"),
    ("torch", "FSDPModule"): ("is sharded for parallel training", f"{FIRST_EXPAND} shard it"),
}


def require_expandable(model: nn.Module) -> None:
    """Raise UserError, which says what to do, where the layers of a model cannot be exchanged in place.

    That is the case for a model inside a wrapper (adapters, compiled code, parallel training), one whose weights are
    quantised, sharded or kept elsewhere, and one of a class that a saved folder could not restore.
    """
    obstacles = chain(_wrappers(model), _weights_elsewhere(model), _special_tensors(model), _another_class(model))
    for problem, remedy in obstacles:
        raise UserError("model", type(model).__name__, problem, remedy)


def require_mixer(mixer: nn.Module, plain: nn.Module) -> None:
    """Raise UserError unless a mixer has the modules and tensors of `plain`, made from the configuration alone."""
    actual, wanted = _outline(mixer), _outline(plain)
    different = sorted(name for name in actual.keys() | wanted.keys() if actual.get(name) != wanted.get(name))
    own_class = _package(type(mixer)) not in ("transformers", "statex", "fla")
    if own_class or different:
        problem = "is a mixer of your own" if own_class else f"is not as configured: its {different[0]} differs"
        raise UserError("model", type(mixer).__name__, problem, "expand the model as from_pretrained gives it")


HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_state_dict_pre_hooks",
    "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
"""Where a module or a tensor of torch keeps the hooks that were registered on it."""


def require_no_hooks(path: str, mixer: nn.Module) -> None:
    """Raise UserError where the user has registered hooks on a module or tensor of a mixer that is to be replaced.

    The hooks would be lost with it, and may refer to its old modules. Hooks that torch and transformers registered are
    ignored.

    Args:
        path: the mixer's name in its model.
    """
    for name, holder in chain(mixer.named_modules(prefix=path), mixer.named_parameters(prefix=path)):
        for kind in HOOKS:
            if any(not _is_of_libraries(hook) for hook in (getattr(holder, kind, None) or {}).values()):
                problem = f"has hooks ({kind.strip('_')}), which would be lost with the {type(mixer).__name__} there"
                raise UserError("model", name, problem, "remove them, expand the model, and register them again")


def _is_of_libraries(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] in ("torch", "transformers")


Obstacles = Iterator[tuple[str, str]]
"""Each says what is wrong and what to do."""


def _wrappers(model: nn.Module) -> Obstacles:
    for module in model.modules():
        for cls in type(module).__mro__:
            package = _package(cls)
            if (found := WRAPPERS.get((package, "*")) or WRAPPERS.get((package, cls.__name__))) is not None:
                yield found
        if module._compiled_call_impl is not None:  # module.compile(), in place
            yield WRAPPERS["torch", "OptimizedModule"]
    if not isinstance(model, PreTrainedModel):
        yield "is not a model of transformers", "expand the model itself, before anything is wrapped around it"


def _weights_elsewhere(model: nn.Module) -> Obstacles:
    remedy = "load it onto one device (no device_map), expand and save it, and load the result with a device_map"
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        yield "has hooks of accelerate, which fetch its weights from other devices or from disk", remedy
    devices = {parameter.device.type for parameter in model.parameters()}
    if "meta" in devices and len(devices) > 1:
        yield "has weights that are not loaded", remedy


def _special_tensors(model: Any) -> Obstacles:
    quantised = "is quantised", f"{FIRST_EXPAND} quantise it"
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        yield quantised
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id") or "DTensor" in (cls.__name__ for cls in type(parameter).__mro__):
            yield WRAPPERS["torch", "FSDPModule"]
        if type(parameter) is not nn.Parameter or parameter.dtype not in PLAIN_DTYPES:
            yield quantised


def _another_class(model: Any) -> Obstacles:
    family = family_of(model.config)
    expected: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if expected is None or not isinstance(model, expected):
        yield f"is not a causal language model of type {family.model_type}", "load it with AutoModelForCausalLM"
    elif type(model) is not expected and not hasattr(model, "replay_expansion"):
        replays = f"{model.config.model_type}'s expanded class ({expanded_name(family)})"
        yield (
            f"is derived from {expected.__name__}, which cannot hold an expanded state",
            f"expand a {expected.__name__}, or derive your class from {replays}",
        )


def expanded_name(family: Family) -> str:
    """Full name of the language model of a family that can hold a plan."""
    name = family.causal_lm_class
    return name if family.holds_plan else f"statex.models.factory.Statex{name.rpartition('.')[2]}"


def _outline(module: nn.Module) -> dict[str, Any]:
    """The kind of each module inside, and the shape of each tensor, by name."""
    kinds: dict[str, Any] = {name: _kind(inner) for name, inner in module.named_modules()}
    return kinds | {name: tuple(tensor.shape) for name, tensor in module.named_parameters()}


def _kind(module: nn.Module) -> type:
    """A module's class; for statex's own, which only compute differently, its transformers base class."""
    return next(cls for cls in type(module).__mro__ if _package(cls) != "statex")


def _package(cls: type) -> str:
    return cls.__module__.partition(".")[0]
