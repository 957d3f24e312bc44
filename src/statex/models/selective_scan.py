"""The first Mamba's mixers in transformers' models on statex's ops.

transformers' forwards give their scan no state to begin with, and its layers hand on nothing that says which document
of a packed row a token is of; so what stands here takes the place of both.

Shape letters: B batch, T time, M width of the residual stream, D channels, N state size, W taps.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks

from statex.families.shared import require_silu
from statex.models.caches import one_cache
from statex.models.delta_rule import NO_PACKED_CACHE
from statex.ops import selective_scan, selective_scan_step, short_convolution, short_convolution_step
from statex.ops.segments import compute_dtype, cu_seqlens_of


class PackedMask(NamedTuple):
    """What the mixers get as `attention_mask` where documents are packed: the one argument that layers hand on."""

    mask: Tensor | None
    """[B, T], 0 at padding."""
    seq_idx: Tensor
    """[B, T], which document of its row each token belongs to."""
    cu_seqlens: Tensor
    """The borders of all documents, rows laid end to end."""


def with_documents(forward: Callable) -> Callable:
    """The forward of a base model, which hands `seq_idx` [B, T] on to its mixers; `cu_seqlens`, what `cu_seqlens_of`
    makes of it, saves computing the borders."""
    _, *names = inspect.signature(forward).parameters

    @functools.wraps(forward)
    def handing_on(
        self: Any, *args: Any, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if seq_idx is None:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: the borders of documents are taken beside seq_idx; give that too.")
            return forward(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        borders = cu_seqlens_of(seq_idx) if cu_seqlens is None else cu_seqlens
        masks = given.get("attention_mask")
        if isinstance(masks, dict):  # one for each kind of layer
            packed: Any = masks | {"linear_attention": PackedMask(masks["linear_attention"], seq_idx, borders)}
        else:
            packed = PackedMask(masks, seq_idx, borders)
        return forward(self, **given | {"attention_mask": packed})

    return handing_on


def selective_scan_mixer(forward: Callable) -> Callable:
    """The forward of a mixer, [B, T, M] to [B, T, M]: the same function as `forward`, but a cached state is continued
    by any number of tokens, packed documents are kept apart, and padding stays 0 behind a projection with a bias.

    `attention_mask` is [B, T], 0 at padding, or a PackedMask. The cache has one of its names in transformers.
    """

    @functools.wraps(forward)
    @force_accelerate_hooks(["conv1d", "dt_proj"])
    def on_selective_scan(
        self: Any,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | PackedMask | None = None,
        *,
        cache_params: Any = None,
    ) -> Tensor:
        cache = one_cache(cache, cache_params)
        require_silu(self.config, "hidden_act")
        mask, seq_idx, cu_seqlens = attention_mask, None, None
        if isinstance(attention_mask, PackedMask):
            mask, seq_idx, cu_seqlens = attention_mask
            if cache is not None:
                raise ValueError(NO_PACKED_CACHE)
        x, gate = _zero_at_padding(self.in_proj(hidden_states), mask).chunk(2, dim=-1)
        x = _zero_at_padding(_convolved(self, x, cache, seq_idx), mask)
        time_step, B, C = self.x_proj(x).split([self.time_step_rank, *2 * [self.ssm_state_size]], dim=-1)
        if hasattr(self, "dt_layernorm"):  # Falcon-Mamba's and Jamba's
            time_step, B, C = self.dt_layernorm(time_step), self.b_layernorm(B), self.c_layernorm(C)
        output = _scanned(self, x, _time_steps(self.dt_proj, time_step), B, C, cache, cu_seqlens)
        return self.out_proj(output * F.silu(gate))

    return on_selective_scan


def _zero_at_padding(x: Tensor, mask: Any) -> Tensor:
    return x if mask is None else x * mask[:, -x.shape[1] :, None].to(x.dtype)


def _convolved(mixer: Any, x: Tensor, cache: Any, seq_idx: Tensor | None) -> Tensor:
    """The short convolution of x [B, T, D], which the cache has the last inputs of, [B, D, W]."""
    weight, bias, T = mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, x.shape[1]
    if cache is None:
        return short_convolution(x, weight, bias, seq_idx=seq_idx)
    states = cache.layers[mixer.layer_idx]
    if states.has_previous_state[0] and T == 1 and not states.record_past:
        return short_convolution_step(x[:, 0], states.conv_states[0], weight, bias)[:, None]
    known = cache.update_conv_state(x.mT, mixer.layer_idx, conv_kernel_size=mixer.conv_kernel_size)
    return short_convolution(known.mT, weight, bias)[:, -T:]


def _time_steps(projection: Any, inputs: Tensor) -> Tensor:
    """dt [B, T, D] in the dtype of the scan, to which the bias is added there: it is large beside what it is added to.

    The weight of a projection that is quantised, or has an adapter, is not all of it.
    """
    dtype, bias = compute_dtype(inputs), projection.bias
    plain = type(projection) is nn.Linear
    projected = F.linear(inputs, projection.weight) if plain else projection(inputs) - bias
    return F.softplus(projected.to(dtype) + bias.to(dtype))


def _scanned(mixer: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, cache: Any, cu_seqlens: Tensor | None) -> Tensor:
    """What is read of the state, [B, T, D], with the skip."""
    A, D = -torch.exp(mixer.A_log.to(dt.dtype)), mixer.D
    if cu_seqlens is not None:
        values, steps, keys, queries = (tensor.reshape(1, -1, tensor.shape[-1]) for tensor in (x, dt, B, C))
        return selective_scan(values, steps, A, keys, queries, D=D, cu_seqlens=cu_seqlens)[0].view_as(x)
    if cache is None:
        return selective_scan(x, dt, A, B, C, D=D)[0]
    states = cache.layers[mixer.layer_idx]
    state = states.recurrent_states[0] if states.is_recurrent_states_initialized[0] else None
    if state is not None and x.shape[1] == 1:
        return selective_scan_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state, D=D)[:, None]
    output, state = selective_scan(x, dt, A, B, C, D=D, initial_state=state, output_final_state=True)
    cache.update_recurrent_state(state, mixer.layer_idx)
    return output
