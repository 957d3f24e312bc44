"""The selective scan (Mamba), one token at a time: the definition that the other versions are tested against.

Shape letters: B batch, T time, D channels, N state size.
"""

import torch
from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision, over_segments


@full_precision
def naive_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t  (arXiv 2312.00752, equation 2).

    Arguments and results are those of `chunk_selective_scan`.
    """
    if cu_seqlens is not None:

        def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **states) -> tuple[Tensor, Tensor | None]:
            return naive_selective_scan(x, dt, A, B, C, D=D, **states)

        return over_segments(recurrence, (x, dt, B, C), cu_seqlens, initial_state, output_final_state)
    output_dtype, dtype = x.dtype, compute_dtype(x)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    zeros = x.new_zeros(x.shape[0], *A.shape)
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, D, N]
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, dt, B, C)), strict=True):
        state = (dt_t[..., None] * A).exp() * state + (dt_t * x_t)[..., None] * B_t[:, None]
        outputs.append(torch.einsum("bdn,bn->bd", state, C_t))
    output = torch.stack(outputs, dim=1)
    if D is not None:
        output = output + D.to(dtype) * x
    return output.to(output_dtype), state if output_final_state else None
