"""What the forwards of transformers' Mamba2-type mixers omit, added to the input projection that they call.

Padding stays 0: transformers sets its inputs to 0, but a bias of the projection makes them non-zero again, and the
convolution carries that into the first tokens of a sequence. And the limits of time steps hold in single steps.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from statex.families import FAMILIES

UNLIMITED = (0.0, math.inf)
"""Limits of time steps that have no effect."""


@contextmanager
def zero_padding() -> Iterator[None]:
    """Inside this context, padding stays 0 in transformers' Mamba2-type mixers whose modules are loaded; reversible."""
    replaced = []
    try:
        mamba2 = (each.mixer_class for each in FAMILIES.values() if each.mixer_class and each.recurrence == "mamba2")
        for path in dict.fromkeys(mamba2):
            module, _, name = path.rpartition(".")
            if module not in sys.modules:
                continue
            mixer = getattr(sys.modules[module], name)
            replaced.append((mixer, mixer.forward))
            mixer.forward = padding_stays_zero(mixer.forward)
        yield
    finally:
        for mixer, forward in replaced:
            mixer.forward = forward


def padding_stays_zero(forward: Callable) -> Callable:
    """The same forward of a mixer, its input projection 0 wherever `attention_mask` [B, T] is 0, and with the limits of
    its time steps in single steps, too, where transformers applies them to whole passes only."""

    @functools.wraps(forward)
    def with_zeros(
        self: Any, hidden_states: torch.Tensor, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        mixer = self
        if attention_mask is not None and getattr(self.in_proj, "bias", None) is not None:
            mixer = _ZeroAtPadding(mixer, attention_mask)
        if hidden_states.shape[1] == 1 and tuple(self.time_step_limit) != UNLIMITED:
            mixer = _WithinLimits(mixer)
        return forward(mixer, hidden_states, *args, attention_mask=attention_mask, **kwargs)

    return with_zeros


class _Seen:
    """A mixer as its forward sees it: the mixer itself except for the input projection."""

    def __init__(self, mixer: Any):
        self.mixer = mixer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixer, name)


class _ZeroAtPadding(_Seen):
    def __init__(self, mixer: Any, mask: torch.Tensor):
        super().__init__(mixer)
        self.mask = mask

    def in_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.mixer.in_proj(hidden_states)
        return projected * self.mask[..., None].to(projected.dtype)


class _WithinLimits(_Seen):
    """softplus is monotone, so limiting its input, the projection's last H outputs, limits the time steps."""

    def in_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.mixer.in_proj(hidden_states)
        others, dt = projected.tensor_split([-self.mixer.num_heads], dim=-1)
        low, high = (_inverse_softplus(limit) - self.mixer.dt_bias for limit in self.mixer.time_step_limit)
        return torch.cat([others, dt.clamp(low.to(dt.dtype), high.to(dt.dtype))], dim=-1)


def _inverse_softplus(limit: float) -> float:
    """The number whose softplus is the limit."""
    if limit in UNLIMITED:
        return -math.inf if limit == 0 else math.inf
    return limit + math.log(-math.expm1(-limit))
