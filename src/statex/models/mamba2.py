"""The expanded Mamba2: transformers' own class, a stored plan replayed, mixers and norms on statex's ops."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2ForCausalLM,
    Mamba2Mixer,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)

from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.dispatch import REPLACEMENTS, norm_forward
from statex.models.keywords import LOSS_KEYWORDS, check_keywords, check_no_attentions
from statex.models.replay import ReplayExpansion
from statex.ops.segments import one_seq_idx


def on_statex_ops(forward: Callable) -> Callable:
    """The same forward with the recurrent functions of its module exchanged for ours, its module left alone.

    Decorators of `forward` are lost.
    """
    inner: Any = inspect.unwrap(forward)
    rebound = types.FunctionType(
        inner.__code__, inner.__globals__ | REPLACEMENTS, inner.__name__, inner.__defaults__, inner.__closure__
    )
    rebound.__kwdefaults__ = inner.__kwdefaults__
    return rebound


class StatexMamba2Mixer(Mamba2Mixer):
    """transformers' mixer; its scan, step and convolution are statex's.

    The forward stays transformers' own, with its limits: where `use_bias` is set, left padding reaches the convolution
    as the bias, and a `time_step_limit` is not applied to single cached steps.
    """

    forward = force_accelerate_hooks("conv1d")(on_statex_ops(Mamba2Mixer.forward))  # decorated as transformers' own


class StatexMamba2RMSNorm(Mamba2RMSNorm):
    """transformers' norm, on statex's op."""

    forward = norm_forward


class StatexMambaRMSNormGated(MambaRMSNormGated):
    """transformers' gated norm, on statex's op."""

    forward = norm_forward


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    Mamba2Mixer: StatexMamba2Mixer,
    Mamba2RMSNorm: StatexMamba2RMSNorm,
    MambaRMSNormGated: StatexMambaRMSNormGated,
}


_SELF, *ARGUMENTS, _KWARGS = inspect.signature(Mamba2ForCausalLM.forward).parameters
"""Of transformers' forward, in their order."""
KEYWORDS = {*ARGUMENTS, "cache_params", *LOSS_KEYWORDS}
"""It takes the cache by its older name, too, and hands on what its loss takes."""


class StatexMamba2ForCausalLM(ReplayExpansion, Mamba2ForCausalLM):
    """Mamba2 with the state of some layers expanded, as the plan in `config.expansion` says."""

    config_class = StatexMamba2Config

    def __init__(self, config: StatexMamba2Config):
        super().__init__(config)
        self.replay_expansion()
        self.use_statex_modules()
        self.post_init()

    @functools.wraps(Mamba2ForCausalLM.forward, assigned=())  # generate and the Trainer read its signature
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
        check_keywords(kwargs, KEYWORDS)
        check_no_attentions(output_attentions)
        if cu_seqlens is not None:
            given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
            tokens = [given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None]
            seq_idx = one_seq_idx(seq_idx, cu_seqlens, *tokens[:1])
        if seq_idx is None:
            return super().forward(*args, **kwargs)
        hook = self.backbone.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"seq_idx": seq_idx}), with_kwargs=True
        )
        try:
            return super().forward(*args, **{"use_cache": False} | kwargs)
        finally:
            hook.remove()

    def use_statex_modules(self) -> None:
        """Put all mixers, expanded or not, and all norms on statex's ops."""
        for module in self.modules():
            module.__class__ = CLASSES.get(type(module), type(module))

    @classmethod
    def adopt(cls, model: nn.Module) -> None:
        """Turn a Mamba2ForCausalLM with a plan in its configuration into this class, in place."""
        model.__class__ = cls
        model.config.__class__ = StatexMamba2Config  # type: ignore[assignment]
        model.use_statex_modules()  # type: ignore[operator]
