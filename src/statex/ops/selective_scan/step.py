"""The selective scan (Mamba), one token, in place on the state.

Shape letters: B batch, D channels, N state size.
"""

from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision


@full_precision
def step_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
) -> Tensor:
    """Advance `state` by one token and read it.

    Args:
        x: [B, D].
        dt: [B, D], after softplus: positive.
        A: [D, N], negative.
        B, C: [B, N].
        state: [B, D, N], updated in place; fp32 (fp64 for fp64 inputs) keeps it as exact as `chunk_selective_scan`.
        D: [D] or None.

    Returns:
        output [B, D] in the dtype of x.
    """
    output_dtype, dtype = x.dtype, compute_dtype(x)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    work = state if state.dtype == dtype else state.to(dtype)
    work.mul_((dt[..., None] * A).exp()).addcmul_((dt * x)[..., None], B[:, None])
    if state.dtype != dtype:
        state.copy_(work)
    output = (work @ C[..., None]).squeeze(-1)
    if D is not None:
        output = output + D.to(dtype) * x
    return output.to(output_dtype)
