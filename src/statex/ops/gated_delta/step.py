"""The gated delta rule, one token, in place on the state.

Shape letters: B batch, H heads, K key dim, V value dim.
"""

from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision


@full_precision
def step_gated_delta(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> Tensor:
    """Advance `state` by one token and read it.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        log_decay: [B, H], or [B, H, K] for one per key channel.
        beta: [B, H].
        state: [B, H, K, V], updated in place; fp32 (fp64 for fp64 inputs) keeps it as exact as `chunk_gated_delta`.
        scale: factor on the output, K**-0.5 by default.

    Returns:
        output [B, H, V] in the dtype of v.
    """
    dtype = compute_dtype(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = state if state.dtype == dtype else state.to(dtype)
    work.mul_(log_decay.to(dtype).exp().view(*log_decay.shape[:2], -1, 1))
    key = k.to(dtype)
    correction = beta.to(dtype)[..., None] * (v.to(dtype) - (key[..., None, :] @ work)[..., 0, :])
    work.addcmul_(key[..., None], correction[..., None, :])
    if state.dtype != dtype:
        state.copy_(work)
    return ((scale * q.to(dtype))[..., None, :] @ work)[..., 0, :].to(v.dtype)
