"""State space duality (Mamba2), one token at a time: the definition that the other versions are tested against.

Shape letters: B batch, T time, H heads, P head dim, N state size, G groups.
"""

import torch
from torch import Tensor

from statex.ops.segments import compute_dtype, full_precision, over_segments


@full_precision
def naive_ssd(
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
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t  (arXiv 2405.21060, section 2).

    Arguments and results are those of `chunk_ssd`.
    """
    if cu_seqlens is not None:

        def recurrence(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **states) -> tuple[Tensor, Tensor | None]:
            return naive_ssd(x, dt, A, B, C, D=D, **states)

        return over_segments(recurrence, (x, dt, B, C), cu_seqlens, initial_state, output_final_state)
    output_dtype, dtype = x.dtype, compute_dtype(x)
    batch, _, num_heads, head_dim = x.shape
    num_groups, state_size = B.shape[2:]
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    B, C = (tensor.repeat_interleave(num_heads // num_groups, dim=2) for tensor in (B, C))  # [B, T, H, N]
    zeros = x.new_zeros(batch, num_heads, head_dim, state_size)
    state = zeros if initial_state is None else initial_state.to(dtype)  # [B, H, P, N]
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (x, dt, B, C)), strict=True):
        state = (dt_t * A).exp()[..., None, None] * state + (dt_t[..., None] * x_t)[..., None] * B_t[..., None, :]
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C_t))
    output = torch.stack(outputs, dim=1)
    if D is not None:
        output = output + D.to(dtype)[:, None] * x
    return output.to(output_dtype), state if output_final_state else None
