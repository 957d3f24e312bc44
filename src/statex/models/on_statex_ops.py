"""Mixers of transformers on statex's ops, transformers' own modules left alone."""

import builtins
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from transformers.integrations.accelerate import force_accelerate_hooks

from statex.models.dispatch import RECURRENCES, find_member


def mixer_on_statex_ops(forward: Callable, recurrence: str) -> Callable:
    """A mixer's forward with statex's recurrence, step and convolution, and the arguments that expanded ones add."""
    around = RECURRENCES[recurrence].around_mixer
    return around(force_accelerate_hooks("conv1d")(on_statex_ops(forward, recurrence)))


@functools.cache
def _module_on_statex_ops(original: types.ModuleType, recurrence: str) -> types.ModuleType:
    """A module with the names of transformers' own, its recurrent functions exchanged for ours.

    It is a module of its own, in `sys.modules`, because torch.compile looks up a function's names in the module that
    its globals name.
    """
    module = types.ModuleType(
        f"{__name__}.{original.__name__.rpartition('.')[2]}", f"{original.__name__} on statex's ops."
    )
    own = vars(module) | {"__builtins__": builtins}
    functions = RECURRENCES[recurrence].functions
    for name in functions:
        find_member(original, name)  # or transformers' own would stay in its place
    vars(module).update(vars(original) | functions | own)
    sys.modules[module.__name__] = module
    return module


def on_statex_ops(forward: Callable, recurrence: str) -> Callable:
    """The same forward with the recurrent functions of its module exchanged for ours, its module left alone.

    Decorators of `forward` are lost.
    """
    inner: Any = inspect.unwrap(forward)
    module = _module_on_statex_ops(sys.modules[inner.__module__], recurrence)
    rebound = types.FunctionType(inner.__code__, module.__dict__, inner.__name__, inner.__defaults__, inner.__closure__)
    rebound.__kwdefaults__ = inner.__kwdefaults__
    return rebound
