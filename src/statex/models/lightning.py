"""MiniMax's lightning attention on statex's ops: Mamba2's recurrence with a decay that is fixed, one for each head.

Shape letters: B batch, T time, D width of the residual stream, H heads, K key dim, V value dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statex.models.caches import one_cache
from statex.models.delta_rule import NO_PACKED_CACHE
from statex.ops import ssd, ssd_step
from statex.ops.segments import compute_dtype


def lightning_attention(forward: Callable) -> Callable:
    """The forward of a mixer, [B, T, D] to [B, T, D] and the state [B, H, V, K]: the same function as `forward`, with a
    key dimension of its own (`key_dim`) where the layer was expanded.

    `cache` is a LightningCache, under its name before transformers 5.24 or since. `cu_seqlens`, the borders of all rows
    laid end to end, starts a fresh state at each document.
    """

    @functools.wraps(forward)
    def on_ssd(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = one_cache(cache, past_key_values)
        if cache is not None and cu_seqlens is not None:
            raise ValueError(NO_PACKED_CACHE)
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = qkv * attention_mask[..., None].to(qkv.dtype)
        key_dim = getattr(self, "key_dim", self.head_dim)
        sizes = [key_dim, key_dim, self.head_dim]
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).split(sizes, dim=-1)  # [B, T, H, K or V]
        output, state = _recurrence(self, q, k, v, cache, cu_seqlens)
        output = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(output.flatten(2))
        return self.out_proj(output), state

    return on_ssd


def _recurrence(
    mixer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The output [B, T, H, V], and the state [B, H, V, K] where there is a cache."""
    B, T, H, _ = q.shape
    dtype = compute_dtype(q)
    dt, A = q.new_ones((B, T, H), dtype=dtype), -mixer.slope_rate.flatten().to(dtype)
    if cu_seqlens is not None:
        values, steps, keys, queries = (x.reshape(1, B * T, *x.shape[2:]) for x in (v, dt, k, q))
        output, _ = ssd(values, steps, A, keys, queries, cu_seqlens=cu_seqlens)
        return output.view_as(v), None
    if cache is None:
        return ssd(v, dt, A, k, q)
    states = cache.recurrent_layer(mixer.layer_idx)
    state = states.recurrent_states[0] if states.is_recurrent_states_initialized[0] else None
    if state is not None and T == 1:
        return ssd_step(v[:, 0], dt[:, 0], A, k[:, 0], q[:, 0], state)[:, None], state
    output, state = ssd(v, dt, A, k, q, initial_state=state, output_final_state=True)
    state = states.update_recurrent_state(state)
    states.has_previous_state[0] = True  # other layers' convolutions say so
    return output, state
