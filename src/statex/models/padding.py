"""Padding that stays 0 in Mamba2-type mixers of transformers whose input projection has a bias.

transformers sets the inputs of padding to 0, but the projection's bias makes something of them again, which the
convolution carries into the first tokens of a sequence.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MIXERS = {
    f"transformers.models.{name}.modeling_{name}": mixer
    for name, mixer in {
        "mamba2": "Mamba2Mixer",
        "bamba": "BambaMixer",
        "granitemoehybrid": "GraniteMoeHybridMambaLayer",
        "zamba2": "Zamba2MambaMixer",
        "nemotron_h": "NemotronHMamba2Mixer",
        "falcon_h1": "FalconH1Mixer",
    }.items()
}
"""The mixer of each module of transformers that has one."""


@contextmanager
def zero_padding() -> Iterator[None]:
    """Within it, padding stays 0 in every model of the modules in MIXERS that are loaded; reversible."""
    replaced = []
    try:
        for name in filter(sys.modules.__contains__, MIXERS):
            mixer = getattr(sys.modules[name], MIXERS[name])
            replaced.append((mixer, mixer.forward))
            mixer.forward = padding_stays_zero(mixer.forward)
        yield
    finally:
        for mixer, forward in replaced:
            mixer.forward = forward


def padding_stays_zero(forward: Callable) -> Callable:
    """The same forward of a mixer, its input projection 0 wherever `attention_mask` [B, T] is 0."""

    @functools.wraps(forward)
    def with_zeros(
        self: Any, hidden_states: torch.Tensor, *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        mixer = self
        if attention_mask is not None and getattr(self.in_proj, "bias", None) is not None:
            mixer = _ZeroAtPadding(self, attention_mask)
        return forward(mixer, hidden_states, *args, attention_mask=attention_mask, **kwargs)

    return with_zeros


class _ZeroAtPadding:
    """A mixer as its forward sees it: all of the mixer's own, but the input projection."""

    def __init__(self, mixer: Any, mask: torch.Tensor):
        self.mixer, self.mask = mixer, mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixer, name)

    def in_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        projected = self.mixer.in_proj(hidden_states)
        return projected * self.mask[..., None].to(projected.dtype)
