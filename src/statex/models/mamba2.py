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
from statex.models.dispatch import REPLACEMENTS, find_member, norm_forward
from statex.models.keywords import LOSS_KEYWORDS, check_keywords, check_no_attentions
from statex.models.padding import padding_stays_zero
from statex.models.replay import ReplayExpansion
from statex.ops.segments import cu_seqlens_of, one_seq_idx


def _module_on_statex_ops(original: types.ModuleType) -> types.ModuleType:
    """A module with the names of transformers' own, its recurrent functions exchanged for ours.

    It is a module of its own, in `sys.modules`, because torch.compile looks up a function's names in the module that
    its globals name.
    """
    module = types.ModuleType(f"{__name__}.on_statex_ops", "transformers' modeling_mamba2 on statex's ops.")
    own = vars(module) | {"__builtins__": builtins}
    for name in REPLACEMENTS:
        find_member(original, name)  # or transformers' own would stay in its place
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


def _with_arguments_of(original: Callable) -> Callable[[Callable], Callable]:
    """Show the arguments of transformers' forward beside those of ours: generate and the Trainer read the signature."""

    def decorate(forward: Callable) -> Callable:
        theirs, ours = (inspect.signature(one) for one in (original, forward))
        *parameters, last = theirs.parameters.values()
        assert last.kind is last.VAR_KEYWORD, "transformers' forward takes further keywords"
        own = [parameter for parameter in ours.parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        forward.__signature__ = theirs.replace(parameters=[*parameters, *own, last])  # type: ignore[attr-defined]
        return forward

    return decorate


_, *MODEL_ARGUMENTS, _ = inspect.signature(Mamba2Model.forward).parameters
MODEL_KEYWORDS = {*MODEL_ARGUMENTS, "cache_params"}  # the older name of the cache
_, *LM_ARGUMENTS, _ = inspect.signature(Mamba2ForCausalLM.forward).parameters
LM_KEYWORDS = {*LM_ARGUMENTS, "cache_params", *LOSS_KEYWORDS}


class StatexMamba2Model(ReplayExpansion, Mamba2Model):
    """The backbone of Mamba2, as AutoModel gives it, with the state of some layers expanded."""

    config_class = StatexMamba2Config

    def __init__(self, config: StatexMamba2Config):
        super().__init__(config)
        self.replay_expansion()
        use_statex_modules(self)
        self.post_init()

    @_with_arguments_of(Mamba2Model.forward)
    def forward(  # type: ignore[override]
        self,
        *args: Any,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', but packed documents keep their states apart, and unknown keywords are refused.

        Args:
            seq_idx: [B, T], which document of a packed row each token belongs to. Such a pass makes no cache.
            cu_seqlens: the same for a batch of 1, as in FLA: [S + 1] int, the borders of the documents from 0 to T.
            output_attentions: of the Hugging Face interface; there are none.
        """
        check_keywords(kwargs, MODEL_KEYWORDS)
        check_no_attentions(output_attentions)
        if seq_idx is None and cu_seqlens is None:
            return super().forward(*args, **kwargs)
        given = dict(zip(MODEL_ARGUMENTS, args, strict=False)) | kwargs
        tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
        if tokens:  # else transformers says that they are missing
            seq_idx = one_seq_idx(seq_idx, cu_seqlens, tokens[0])
        borders = cu_seqlens_of(seq_idx) if seq_idx is not None else None  # for all layers
        return super().forward(*args, **{"use_cache": False} | kwargs, seq_idx=seq_idx, cu_seqlens=borders)


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


class StatexMamba2ForCausalLM(ReplayExpansion, Mamba2ForCausalLM):
    """Mamba2 with the state of some layers expanded, as the plan in `config.expansion` says."""

    config_class = StatexMamba2Config

    def __init__(self, config: StatexMamba2Config):
        super().__init__(config)
        self.replay_expansion()
        use_statex_modules(self)
        self.post_init()

    @_with_arguments_of(Mamba2ForCausalLM.forward)
    def forward(  # type: ignore[override]
        self,
        *args: Any,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; `seq_idx` and `cu_seqlens` also reach the backbone (StatexMamba2Model.forward)."""
        check_keywords(kwargs, LM_KEYWORDS)
        check_no_attentions(output_attentions)
        if seq_idx is None and cu_seqlens is None:
            return super().forward(*args, **kwargs)
        documents = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens}
        hook = self.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | documents), with_kwargs=True
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
