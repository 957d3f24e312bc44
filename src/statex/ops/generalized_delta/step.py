"""The generalised delta rule, one token, in place on the state.

Shape letters: B batch, H heads, K key dim, V value dim.
"""

from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision


@full_precision
def step_generalized_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Advance `state` by one token and read it.

    Args:
        q, k, log_decay, a, b: [B, H, K].
        v: [B, H, V].
        state: [B, H, K, V], updated in place; fp32 (fp64 for fp64 inputs) keeps it as exact as
            `chunk_generalized_delta`.
        scale: factor on the output, K**-0.5 by default.

    Returns:
        output [B, H, V] in the dtype of v.
    """
    dtype = compute_dtype(v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    work = state if state.dtype == dtype else state.to(dtype)
    read = a.to(dtype)[..., None, :] @ work  # [B, H, 1, V], of the state before it decays
    work.mul_(log_decay.to(dtype).exp()[..., None])
    work.addcmul_(b.to(dtype)[..., None], read).addcmul_(k.to(dtype)[..., None], v.to(dtype)[..., None, :])
    if state.dtype != dtype:
        state.copy_(work)
    return ((scale * q.to(dtype))[..., None, :] @ work)[..., 0, :].to(v.dtype)
