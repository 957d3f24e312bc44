"""What the modules of transformers' gated delta rule models call, on statex's ops: the functions and the gated norm.

Shape letters: B batch, T time, G key heads, H value heads (a multiple of G), K key dim, V value dim.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statex.ops import gated_delta, gated_delta_step, gated_rms_norm
from statex.ops.segments import compute_dtype, cu_seqlens_of

NO_PACKED_CACHE = "seq_idx: packed documents cannot be continued from a cache; pass use_cache=False."
L2_EPS = 1e-6
"""transformers' own, added to the square of a key's or query's length."""


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    query_channels: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' function of many tokens: query and key [B,T,G,K], value [B,T,H,V], g [B,T,H] or [B,T,H,K],
    beta [B,T,H].

    Returns the output [B,T,H,V], and the final state [B,H,K,V] where asked. `seq_idx` [B,T], or the borders
    `cu_seqlens` of all rows laid end to end, start a fresh state at each document. In an expanded
    layer, `query_channels` is the number of key channels before: they alone determine the query's length and scale.
    `chunk_size` is the caller's hint, which ours does not need.

    Raises:
        ValueError: packed documents with a cache.
    """
    borders = cu_seqlens if cu_seqlens is not None else cu_seq_lens_q
    if borders is None and seq_idx is not None:
        borders = cu_seqlens_of(seq_idx)
    if borders is not None and (output_final_state or initial_state is not None):
        raise ValueError(NO_PACKED_CACHE)
    channels = query_channels or query.shape[-1]
    if use_qk_l2norm_in_kernel:
        query, key = normalised(query, channels), normalised(key, key.shape[-1])
    query, key = (for_each_value_head(x, value) for x in (query, key))
    tokens = [query, key, value, g, beta]
    if borders is not None:
        tokens = [x.reshape(1, -1, *x.shape[2:]) for x in tokens]
    output, state = gated_delta(
        *tokens,
        scale=channels**-0.5,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=borders,
    )
    return output.view_as(value), state


def recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    query_channels: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' function of a single cached token, T = 1, as `chunk_gated_delta_rule`; `initial_state` is advanced
    in place, and returned."""
    channels = query_channels or query.shape[-1]
    if use_qk_l2norm_in_kernel:
        query, key = normalised(query, channels), normalised(key, key.shape[-1])
    query, key = (for_each_value_head(x, value) for x in (query, key))
    query, key, value, g, beta = (x[:, 0] for x in (query, key, value, g, beta))
    output = gated_delta_step(query, key, value, g, beta, initial_state, scale=channels**-0.5)
    return output[:, None], initial_state if output_final_state else None


def normalised(x: Tensor, num_channels: int) -> Tensor:
    """Vectors [..., K] divided by the length of their first channels, in fp32 (fp64 for fp64 inputs)."""
    x = x.to(compute_dtype(x))
    return x * torch.rsqrt(x[..., :num_channels].square().sum(-1, keepdim=True) + L2_EPS)


def for_each_value_head(x: Tensor, value: Tensor) -> Tensor:
    """[B, T, G, K] to [B, T, H, K]: each key head serves as many value heads in a row."""
    repeats = value.shape[2] // x.shape[2]
    return x if repeats == 1 else x.repeat_interleave(repeats, dim=2)


def gated_norm_forward(self: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:
    """The forward of transformers' output norms of these models: both [..., V], the weight [V]."""
    return gated_rms_norm(hidden_states, self.weight, gate, eps=self.variance_epsilon)


def with_query_channels(forward: Any) -> Any:
    """A mixer's forward that hands its `query_channels` and the borders of packed documents on to the functions above.

    transformers' forwards pass keywords that they do not know to them, and borders under this name.
    """

    @functools.wraps(forward)
    def with_keywords(
        self: Any, hidden_states: Tensor, *args: Any, cu_seqlens: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        channels = getattr(self, "query_channels", None)
        return forward(self, hidden_states, *args, cu_seq_lens_q=cu_seqlens, query_channels=channels, **kwargs)

    return with_keywords


GATED_DELTA: dict[str, Callable] = {
    "torch_chunk_gated_delta_rule": chunk_gated_delta_rule,
    "torch_recurrent_gated_delta_rule": recurrent_gated_delta_rule,
}
KIMI_DELTA: dict[str, Callable] = {
    "chunk_kimi_delta_attention": chunk_gated_delta_rule,
    "recurrent_kimi_delta_attention": recurrent_gated_delta_rule,
}
