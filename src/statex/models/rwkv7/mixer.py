"""The two halves of an RWKV-7 block (arXiv 2503.14456), on statex's own recurrence, on any device.

Shape letters: B batch, T time, H heads, K key dim of a head, V value dim of a head, D width of the residual stream.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from statex.models.rwkv7.configuration import RWKV7Config
from statex.ops import generalized_delta, generalized_delta_step
from statex.ops.segments import compute_dtype

STRONGEST_LOG_DECAY = -math.exp(-0.5)
MIXED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")


class LowRank(nn.Module):
    """A projection through few channels, under FLA's names: `lora.0`, an activation, `lora.2`."""

    lora: Any

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, activation: nn.Module, *, bias: bool = True):
        super().__init__()
        down, up = nn.Linear(num_inputs, rank, bias=False), nn.Linear(rank, num_outputs, bias=bias)
        self.lora = nn.Sequential(down, activation, up)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """The token mixer: S_t = S_{t-1} diag(w_t) - (S_{t-1} kk_t) (kk_t a_t)^T + v_t k_t^T, read by r_t.

    kk is the key times k_k, divided by its length in each head; k is the key times 1 + (a - 1) k_a. The values of all
    layers but the first are mixed with the first one's.

    Args:
        config: the model's configuration.
        layer_idx: which layer this is.
        key_dim: of a head of this layer, where it differs from the configuration's.
    """

    def __init__(self, config: RWKV7Config, layer_idx: int, *, key_dim: int | None = None):
        super().__init__()
        assert config.num_heads is not None  # the configuration fills these in
        assert config.head_dim is not None
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads
        self.key_dim = key_dim or config.head_dim
        D, H, num_values = config.hidden_size, self.num_heads, config.num_values
        num_keys = H * self.key_dim
        ranks: Any = config
        for name in MIXED:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, D)))
        self.k_k = nn.Parameter(torch.empty(num_keys))
        self.k_a = nn.Parameter(torch.empty(num_keys))
        self.r_k = nn.Parameter(torch.empty(H, self.key_dim))
        self.r_proj = nn.Linear(D, num_keys, bias=False)
        self.k_proj = nn.Linear(D, num_keys, bias=False)
        self.v_proj = nn.Linear(D, num_values, bias=False)
        self.o_proj = nn.Linear(num_values, D, bias=False)
        self.w_lora = LowRank(D, num_keys, ranks.decay_low_rank_dim, nn.Tanh())
        self.a_lora = LowRank(D, num_keys, ranks.a_low_rank_dim, nn.Identity())
        if layer_idx > 0:
            self.v_lora = LowRank(D, num_values, ranks.v_low_rank_dim, nn.Identity())
        self.g_lora = LowRank(D, num_values, ranks.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(H, num_values, eps=config.head_dim * config.norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        first_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix tokens: [B, T, D] to [B, T, D], and the first layer's values [B, T, H * V], which are made by that layer.

        `attention_mask` is [B, T], 0 at padding, which neither writes to the state nor lets it decay. `seq_idx`
        [B, T] with `cu_seqlens` start a fresh state at each document of a packed row.
        """
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        states = cache.layers[self.layer_idx] if cache is not None else None
        change = token_before(hidden_states, states, seq_idx) - hidden_states
        x_r, x_w, x_k, x_v, x_a, x_g = (hidden_states + change * getattr(self, name) for name in MIXED)

        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.v_proj(x_v)
        if first_values is None:
            first_values = v
        else:
            v = torch.lerp(v, first_values, self.v_lora(x_v).sigmoid())
        dtype = compute_dtype(hidden_states)
        log_decay = STRONGEST_LOG_DECAY * self.w_lora(x_w).to(dtype).sigmoid()
        rate = self.a_lora(x_a).to(dtype).sigmoid()
        removed = F.normalize((k * self.k_k).to(dtype).unflatten(-1, (self.num_heads, -1)), dim=-1)  # [B, T, H, K]
        k = k * (1 + (rate - 1) * self.k_a).to(k.dtype)
        r, k, v, log_decay, rate = (x.unflatten(-1, (self.num_heads, -1)) for x in (r, k, v, log_decay, rate))
        if attention_mask is not None:  # after a token, padding is not 0: it contains that token's share
            mask = attention_mask[..., None, None]
            k, removed, log_decay = (x * mask.to(x.dtype) for x in (k, removed, log_decay))

        output = self._recurrence(r, k, v, log_decay, -removed, removed * rate, states=states, cu_seqlens=cu_seqlens)
        B, T = output.shape[:2]
        output = self.g_norm(output.reshape(B * T, -1)).view(B, T, -1)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
        return self.o_proj((output + bonus.flatten(2)) * self.g_lora(x_g)), first_values

    def _recurrence(self, *inputs: torch.Tensor, states: Any, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """[B, T, H, V] of r, k, v, log decay, a and b [B, T, H, K or V]."""
        if cu_seqlens is not None:
            B, T = inputs[0].shape[:2]
            packed = (x.reshape(1, B * T, *x.shape[2:]) for x in inputs)
            return generalized_delta(*packed, scale=1.0, cu_seqlens=cu_seqlens)[0].unflatten(1, (B, T))[0]
        if states is None:
            return generalized_delta(*inputs, scale=1.0)[0]
        state = states.recurrent_states[0] if states.is_recurrent_states_initialized[0] else None
        if state is not None and inputs[0].shape[1] == 1:
            r, k, v, log_decay, a, b = (x.squeeze(1) for x in inputs)
            return generalized_delta_step(r, k, v, log_decay, a, b, state, scale=1.0).unsqueeze(1)
        output, state = generalized_delta(*inputs, scale=1.0, initial_state=state, output_final_state=True)
        states.update_recurrent_state(state)
        return output


class RWKV7FeedForward(nn.Module):
    """The channel mixer: a squared ReLU on a mix of each token and the one before."""

    def __init__(self, config: RWKV7Config, layer_idx: int):
        super().__init__()
        assert config.intermediate_size is not None  # the configuration fills it in
        self.layer_idx = layer_idx
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, T, D] to [B, T, D]; the arguments are those of the token mixer."""
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
        states = cache.layers[self.layer_idx] if cache is not None else None
        change = token_before(hidden_states, states, seq_idx) - hidden_states
        return self.value(F.relu(self.key(hidden_states + change * self.x_k)).square())


def token_before(x: torch.Tensor, states: Any, seq_idx: torch.Tensor | None) -> torch.Tensor:
    """x [B, T, D] shifted by one token: 0 at the first token of a document.

    A layer's cache holds the last token of both halves of its block in a queue of two: each half appends its own and
    removes the oldest one, which is its own from the previous pass.
    """
    if states is None:
        before = F.pad(x, (0, 0, 1, -1))
    else:
        queue = states.update_conv_state(x[:, -1, :, None], conv_kernel_size=2)  # [B, D, 2 or 3], 0 at the beginning
        before = torch.cat((queue[..., 0][:, None].to(x.dtype), x[:, :-1]), dim=1)
    if seq_idx is None:
        return before
    continues = F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0))
    return before * continues[..., None].to(x.dtype)
