"""The two halves of an xLSTM block (arXiv 2503.13427), on GLA's recurrence, on any device.

Shape letters: B batch, T time, H heads, K key dim of a head, V value dim of a head, D width of the residual stream.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from statex.models.xlstm.configuration import StatexXLSTMConfig
from statex.ops import gla, gla_step
from statex.ops.segments import compute_dtype

APART = 1e9
"""More than what two tokens of a row can differ by: keeps documents apart in a running maximum."""


class MultiHeadLayerNorm(nn.Module):
    """A layer norm of each head without bias: [B, T, H, V] to [B, T, H * V]."""

    def __init__(self, num_features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.to(compute_dtype(x)), x.shape[-1:], eps=self.eps).to(x.dtype)
        return normed.flatten(2) * self.weight


class MLSTM(nn.Module):
    """The token mixer: S_t = f_t S_{t-1} + i_t v_t k_t^T and n_t = f_t n_{t-1} + i_t k_t, with an exponential i and a
    sigmoid f. What q_t reads of them is S_t q_t / max(|n_t q_t|, 1).

    n is one more value, which is always 1, and all key channels decay alike: both are one recurrence of GLA's kind.
    Mamba2's would have to divide by its steps, -log f, what they multiply, and lose the small gradients of f in that.

    Args:
        config: the model's configuration.
        layer_idx: which layer this is.
        key_dim: of a head of this layer, where it differs from the configuration's.
    """

    def __init__(self, config: StatexXLSTMConfig, layer_idx: int, *, key_dim: int | None = None):
        super().__init__()
        self.layer_idx, self.num_heads = layer_idx, config.num_heads
        self.gate_soft_cap, self.eps = config.gate_soft_cap, config.eps
        D, H, num_values = config.hidden_size, config.num_heads, config.num_values
        self.scale = (config.num_keys // H) ** -0.5
        self.key_dim = key_dim or config.num_keys // H
        self.q = nn.Linear(D, H * self.key_dim, bias=False)
        self.k = nn.Linear(D, H * self.key_dim, bias=False)
        self.v = nn.Linear(D, num_values, bias=False)
        self.ogate_preact = nn.Linear(D, num_values, bias=False)
        self.igate_preact = nn.Linear(D, H)
        self.fgate_preact = nn.Linear(D, H)
        self.multihead_norm = MultiHeadLayerNorm(num_values, config.norm_eps)
        self.out_proj = nn.Linear(num_values, D, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens: [B, T, D] to [B, T, D].

        `attention_mask` is [B, T], 0 at padding, which neither writes to the state nor lets it decay. `seq_idx`
        [B, T] with `cu_seqlens` start a fresh state at each document of a packed row.
        """
        q, k, v = (each(hidden_states).unflatten(-1, (self.num_heads, -1)) for each in (self.q, self.k, self.v))
        write, log_forget = (self._capped(gate(hidden_states)) for gate in (self.igate_preact, self.fgate_preact))
        log_forget = F.logsigmoid(log_forget)  # [B, T, H], as `write`
        if attention_mask is not None:
            padding = attention_mask[..., None] == 0
            write, log_forget = write.masked_fill(padding, -torch.inf), log_forget.masked_fill(padding, 0.0)
        states = cache.layers[self.layer_idx] if cache is not None else None
        before = _held(states)
        largest = running_maximum(write, log_forget, before[1][..., -1] if before else None, seq_idx)

        written = (k * write.exp()[..., None]).to(k.dtype)
        values_and_one = torch.cat([v, v.new_ones((*v.shape[:-1], 1))], dim=-1)  # [B, T, H, V + 1]
        tokens = q, written, values_and_one, log_forget[..., None].expand(*log_forget.shape, self.key_dim)
        read, state = self._recurrence(tokens, before, states is not None, cu_seqlens)
        if states is not None:
            assert state is not None
            _hold(states, state, largest[:, -1])
        values, normaliser = read.to(write.dtype).split([v.shape[-1], 1], dim=-1)
        output = values / (normaliser.abs().clamp_min(1.0) + self.eps * largest.exp()[..., None])
        gate = torch.sigmoid(self.ogate_preact(hidden_states))
        return self.out_proj(gate * self.multihead_norm(output.to(v.dtype)))

    def _capped(self, gate: Tensor) -> Tensor:
        gate = gate.to(compute_dtype(gate))
        return self.gate_soft_cap * torch.tanh(gate / self.gate_soft_cap)

    def _recurrence(
        self, tokens: tuple[Tensor, ...], before: Any, keeps_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What is read of values and normaliser, [B, T, H, V + 1]; where asked the state of both, [B, H, K, V + 1]."""
        B, T = tokens[0].shape[:2]
        if cu_seqlens is not None:
            packed = (x.reshape(1, B * T, *x.shape[2:]) for x in tokens)
            return gla(*packed, scale=self.scale, cu_seqlens=cu_seqlens)[0].view(B, T, *tokens[2].shape[2:]), None
        state = torch.cat([before[0], before[1][..., :-1, None]], dim=-1) if before else None
        if state is not None and T == 1:
            q, k, v, log_decay = (x[:, 0] for x in tokens)
            return gla_step(q, k, v, log_decay, state, scale=self.scale)[:, None], state
        return gla(*tokens, scale=self.scale, initial_state=state, output_final_state=keeps_state)


def running_maximum(write: Tensor, log_forget: Tensor, before: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """m_t = max(log f_t + m_{t-1}, log i_t), [B, T, H], from `before` [B, H] or 0; without a gradient.

    The reference implementation divides by exp(m) what it sums, and adds its epsilon to that.
    """
    dtype, write, log_forget = write.dtype, write.detach().double(), log_forget.detach().double()
    starts = torch.zeros(write.shape[:2], dtype=torch.bool, device=write.device)
    starts[:, 0] = True
    if seq_idx is not None:
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    first = log_forget if before is None else log_forget + before[:, None].double()
    sums = log_forget.cumsum(1)
    candidates = torch.where(starts[..., None], torch.maximum(write, first), write) - sums
    document = APART * starts.cumsum(1)[..., None]
    return (sums + (candidates + document).cummax(1).values - document).to(dtype)


def _held(states: Any) -> tuple[Tensor, Tensor] | None:
    """The state [B, H, K, V] in a cache, and [B, H, K + 1], the normaliser's beside the running maximum."""
    if states is None or not states.has_previous_state[0]:
        return None
    return states.recurrent_states[0], states.conv_states[0]


def _hold(states: Any, state: Tensor, largest: Tensor) -> None:
    """Keep both. Caches have one recurrent state a layer, and beside it what a convolution has yet to read."""
    states.update_recurrent_state(state[..., :-1])
    states.update_conv_state(torch.cat([state[..., -1], largest[..., None].to(state)], dim=-1))


class FeedForward(nn.Module):
    """The channel mixer, a SwiGLU."""

    def __init__(self, config: StatexXLSTMConfig):
        super().__init__()
        multiple = config.ffn_round_up_to_multiple_of
        width = int((config.hidden_size * config.ffn_proj_factor + multiple - 1) // multiple) * multiple
        self.proj_up_gate = nn.Linear(config.hidden_size, width, bias=False)
        self.proj_up = nn.Linear(config.hidden_size, width, bias=False)
        self.proj_down = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_down(F.silu(self.proj_up_gate(x)) * self.proj_up(x))
