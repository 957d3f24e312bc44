"""The expanded Mamba2: transformers' own class, a stored plan replayed, mixers and norms on statex's ops."""

import builtins
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2Model,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.dispatch import REPLACEMENTS, norm_forward
from statex.models.padding import padding_stays_zero
from statex.models.replay import ReplayExpansion


def _module_on_statex_ops(original: types.ModuleType) -> types.ModuleType:
    """A module with the names of transformers' own, its recurrent functions exchanged for ours.

    It is a module of its own, in `sys.modules`, because torch.compile looks up a function's names in the module that
    its globals name.
    """
    module = types.ModuleType(f"{__name__}.on_statex_ops", "transformers' modeling_mamba2 on statex's ops.")
    own = vars(module) | {"__builtins__": builtins}
    vars(module).update(vars(original) | REPLACEMENTS | own)
    sys.modules[module.__name__] = module
    return module


def on_statex_ops(forward: Callable) -> Callable:
    """The same forward with the recurrent functions of its module exchanged for ours, its module left alone.

    Decorators of `forward` are lost.
    """
    inner: Any = inspect.unwrap(forward)
    module = _module_on_statex_ops(sys.modules[inner.__module__])
    rebound = types.FunctionType(inner.__code__, module.__dict__, inner.__name__, inner.__defaults__, inner.__closure__)
    rebound.__kwdefaults__ = inner.__kwdefaults__
    return rebound


class StatexMamba2Mixer(Mamba2Mixer):
    """transformers' mixer; its scan, step and convolution are statex's, and padding stays 0 where `use_bias` is set.

    The forward stays transformers' own, with its limit: a `time_step_limit` is not applied to single cached steps.
    """

    forward = padding_stays_zero(force_accelerate_hooks("conv1d")(on_statex_ops(Mamba2Mixer.forward)))


class StatexMamba2RMSNorm(Mamba2RMSNorm):
    """transformers' norm, on statex's op."""

    forward = norm_forward


class StatexMambaRMSNormGated(MambaRMSNormGated):
    """transformers' gated norm, on statex's op."""

    forward = norm_forward


class StatexMamba2Model(ReplayExpansion, Mamba2Model):
    """The backbone of Mamba2, as AutoModel gives it, with the state of some layers expanded."""

    config_class = StatexMamba2Config

    def __init__(self, config: StatexMamba2Config):
        super().__init__(config)
        self.replay_expansion()
        use_statex_modules(self)
        self.post_init()


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Mamba2Mixer: StatexMamba2Mixer,
    Mamba2Model: StatexMamba2Model,
    Mamba2RMSNorm: StatexMamba2RMSNorm,
    MambaRMSNormGated: StatexMambaRMSNormGated,
}


def use_statex_modules(model: nn.Module) -> None:
    """Put all mixers, expanded or not, and all norms of a Mamba2 on statex's ops, in place."""
    for module in model.modules():
        module.__class__ = CLASSES.get(type(module), type(module))


def _with_full_signature(forward: Callable) -> Callable:
    """Show the arguments of transformers' forward and those of ours: generate and the Trainer read the signature."""
    theirs, ours = (inspect.signature(one) for one in (Mamba2ForCausalLM.forward, forward))
    *parameters, last = theirs.parameters.values()
    assert last.kind is last.VAR_KEYWORD, "transformers' forward takes further keywords"
    own = [parameter for parameter in ours.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
    forward.__signature__ = theirs.replace(parameters=[*parameters, *own, last])  # type: ignore[attr-defined]
    return forward


class StatexMamba2ForCausalLM(ReplayExpansion, Mamba2ForCausalLM):
    """Mamba2 with the state of some layers expanded, as the plan in `config.expansion` says."""

    config_class = StatexMamba2Config

    def __init__(self, config: StatexMamba2Config):
        super().__init__(config)
        self.replay_expansion()
        use_statex_modules(self)
        self.post_init()

    @_with_full_signature
    def forward(  # type: ignore[override]
        self, *args: Any, seq_idx: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As transformers'; `seq_idx` [B, T] also reaches the backbone, so that each packed document has its own state.

        Such a pass makes no cache.
        """
        if seq_idx is None:
            return super().forward(*args, **kwargs)
        hook = self.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"seq_idx": seq_idx}), with_kwargs=True
        )
        try:
            return super().forward(*args, **{"use_cache": False} | kwargs)
        finally:
            hook.remove()

    @classmethod
    def adopt(cls, model: nn.Module) -> None:
        """Turn a Mamba2ForCausalLM with a plan in its configuration into this class, in place."""
        model.__class__ = cls
        model.config.__class__ = StatexMamba2Config  # type: ignore[assignment]
        use_statex_modules(model)
