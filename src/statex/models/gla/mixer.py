"""The token mixer of GLA (arXiv 2312.06635), on statex's own recurrences, on any device.

Shape letters: B batch, T time, H heads, K key dim of a head, V value dim of a head, D width of the residual stream.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from statex.models.gla.configuration import GLAConfig
from statex.ops import gated_rms_norm, gla, gla_step, short_convolution
from statex.ops.segments import compute_dtype

GATE_LOGIT_NORMALIZER = 16  # fixed in FLA's model, not part of its configuration
GATE_LOW_RANK_DIM = 16
FEATURE_MAPS: dict[str, Callable] = {  # by FLA's names, as FLA computes them
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "gelu": partial(F.gelu, approximate="tanh"),
}


class ShortConvolution(nn.Module):
    """The weight of a causal depthwise convolution, stored as torch's Conv1d does: [channels, 1, taps].

    Calling it returns the weight as [channels, taps]: hooks that bring a module's weights to its device see the call.
    """

    def __init__(self, num_channels: int, num_taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_channels, 1, num_taps))

    def forward(self) -> torch.Tensor:
        return self.weight.squeeze(1)


class OutputRMSNorm(nn.RMSNorm):
    """RMSNorm in fp32 (fp64 for fp64 inputs), whatever the dtype of its weight, then times the SiLU of a gate."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        assert self.eps is not None  # the configuration has one
        return gated_rms_norm(x, self.weight, gate, eps=self.eps)


class GatedLinearAttention(nn.Module):
    """The token mixer: S_t = diag(a_t) S_{t-1} + k_t^T v_t, o_t = q_t S_t, with a_t = sigmoid(W2 W1 x_t + b)^(1/16).

    Args:
        config: the model's configuration.
        layer_idx: which layer this is.
        num_heads, num_kv_heads, key_dim: of this layer, where they differ from the configuration's; `key_dim` is one
            head's.
        rank: the key dimensions beyond the configuration's come from low-rank projections of this rank.
    """

    def __init__(
        self,
        config: GLAConfig,
        layer_idx: int,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        key_dim: int | None = None,
        rank: int | None = None,
    ):
        super().__init__()
        assert config.num_kv_heads is not None  # the configuration fills it in
        self.layer_idx = layer_idx
        self.num_heads = num_heads or config.num_heads
        self.num_kv_heads = num_kv_heads or config.num_kv_heads
        base_key_dim = config.key_dim // self.num_heads
        self.key_dim = key_dim or base_key_dim
        self.value_dim = config.value_dim // self.num_heads
        self.scale = base_key_dim**-0.5  # a grown head keeps its scale, so that it computes the same function
        self.clamp_min = config.clamp_min
        self.feature_map = FEATURE_MAPS[config.feature_map] if config.feature_map is not None else None
        self.use_short_conv = config.use_short_conv
        self.use_output_gate = config.use_output_gate

        D, H, H_kv = config.hidden_size, self.num_heads, self.num_kv_heads
        projected_key_dim = base_key_dim if rank else self.key_dim
        self.q_proj = nn.Linear(D, H * projected_key_dim, bias=False)
        self.k_proj = nn.Linear(D, H_kv * projected_key_dim, bias=False)
        self.v_proj = nn.Linear(D, H_kv * self.value_dim, bias=False)
        self.rank = rank
        if rank:
            self.q_low_rank = _low_rank(D, rank, H * (self.key_dim - base_key_dim))
            self.k_low_rank = _low_rank(D, rank, H_kv * (self.key_dim - base_key_dim))
        if config.use_output_gate:
            self.g_proj = nn.Linear(D, config.value_dim, bias=False)
        if config.use_short_conv:
            self.q_conv1d = ShortConvolution(H * self.key_dim, config.conv_size)
            self.k_conv1d = ShortConvolution(H_kv * self.key_dim, config.conv_size)
            self.v_conv1d = ShortConvolution(H_kv * self.value_dim, config.conv_size)
        self.gk_proj = nn.Sequential(
            nn.Linear(D, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, H_kv * self.key_dim)
        )
        self.o_proj = nn.Linear(config.value_dim, D, bias=False)
        self.norm_name = "g_norm_swish_gate" if config.fuse_norm and config.use_output_gate else "g_norm"
        norm = OutputRMSNorm(self.value_dim, eps=config.norm_eps, elementwise_affine=bool(config.elementwise_affine))
        self.add_module(self.norm_name, norm)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mix tokens: [B, T, D] to [B, T, D].

        `attention_mask` is [B, T], 0 at padding, which neither writes to the state nor lets it decay. `seq_idx`
        [B, T] with `cu_seqlens` start a fresh state at each document of a packed row.
        """
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        states = cache.layers[self.layer_idx] if cache is not None else None

        q, k, v = self._queries_keys_values(hidden_states, states, seq_idx)  # [B, T, H or H_kv, K or V]
        dtype = compute_dtype(hidden_states)
        log_decay = F.logsigmoid(self.gk_proj(hidden_states).to(dtype)) / GATE_LOGIT_NORMALIZER
        if self.clamp_min is not None:
            log_decay = log_decay.clamp_min(self.clamp_min)
        log_decay = log_decay.unflatten(-1, (self.num_kv_heads, self.key_dim))
        if self.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        if (
            attention_mask is not None
        ):  # a convolution or feature map may have turned padding's zeros into something else
            mask = attention_mask[..., None, None]
            k, log_decay = k * mask.to(k.dtype), log_decay * mask.to(log_decay.dtype)
        if self.num_kv_heads != self.num_heads:
            groups = self.num_heads // self.num_kv_heads
            k, v, log_decay = (x.repeat_interleave(groups, dim=2) for x in (k, v, log_decay))

        output = self._recurrence(q, k, v, log_decay, states, cu_seqlens)  # [B, T, H, V]
        gate = self.g_proj(hidden_states).view_as(output) if self.use_output_gate else None
        return self.o_proj(getattr(self, self.norm_name)(output, gate).flatten(2))

    def _queries_keys_values(self, hidden_states, states, seq_idx):
        q, k, v = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.rank:
            q = _join_heads(q, self.q_low_rank(hidden_states), self.num_heads)
            k = _join_heads(k, self.k_low_rank(hidden_states), self.num_kv_heads)
        if self.use_short_conv:
            sizes = [q.shape[-1], k.shape[-1], v.shape[-1]]
            weight = torch.cat([self.q_conv1d(), self.k_conv1d(), self.v_conv1d()])
            qkv = torch.cat([q, k, v], dim=-1)
            left_context = None
            if states is not None:
                left_context = _update_convolution_state(states, qkv, weight.shape[1])
            q, k, v = short_convolution(qkv, weight, left_context=left_context, seq_idx=seq_idx).split(sizes, dim=-1)
        return (
            q.unflatten(-1, (self.num_heads, self.key_dim)),
            k.unflatten(-1, (self.num_kv_heads, self.key_dim)),
            v.unflatten(-1, (self.num_kv_heads, self.value_dim)),
        )

    def _recurrence(self, q, k, v, log_decay, states, cu_seqlens):
        if cu_seqlens is not None:
            B, T = q.shape[:2]
            packed = (x.reshape(1, B * T, *x.shape[2:]) for x in (q, k, v, log_decay))
            return gla(*packed, scale=self.scale, cu_seqlens=cu_seqlens)[0].view(B, T, *v.shape[2:])
        if states is None:
            return gla(q, k, v, log_decay, scale=self.scale)[0]
        state = states.recurrent_states[0] if states.is_recurrent_states_initialized[0] else None
        if state is not None and q.shape[1] == 1:
            q, k, v, log_decay = (x.squeeze(1) for x in (q, k, v, log_decay))
            return gla_step(q, k, v, log_decay, state, scale=self.scale).unsqueeze(1)
        output, state = gla(q, k, v, log_decay, scale=self.scale, initial_state=state, output_final_state=True)
        states.update_recurrent_state(state)
        states.has_previous_state[0] = True  # set by the convolution's update, where there is one
        return output


def _low_rank(num_inputs: int, rank: int, num_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(num_inputs, rank, bias=False), nn.Linear(rank, num_outputs, bias=False))


def _join_heads(base: torch.Tensor, new: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Append each head's new channels to its old ones: [..., H * K0] and [..., H * K1] to [..., H * (K0 + K1)]."""
    heads = [x.unflatten(-1, (num_heads, -1)) for x in (base, new)]
    return torch.cat(heads, dim=-1).flatten(-2)


def _update_convolution_state(states: Any, x: torch.Tensor, num_taps: int) -> torch.Tensor | None:
    """Keep the last `num_taps` inputs of x [B, T, channels]; return those kept before, None at the beginning.

    Transformers' caches hold them as [B, channels, taps], with zeros before the first.
    """
    if states.has_previous_state[0]:
        tail = x[:, -num_taps:].mT
        return states.update_conv_state(tail)[..., : -tail.shape[-1]].mT
    states.update_conv_state(F.pad(x, (0, 0, max(0, num_taps - x.shape[1]), 0))[:, -num_taps:].mT)
    return None
