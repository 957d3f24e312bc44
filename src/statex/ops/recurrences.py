"""The public recurrences, whole sequences and single tokens: check the arguments, then run what `backends` chooses.

Shape letters: B batch, T time, H heads, K key dim, V value dim (gla, gated_delta, generalized_delta); P head dim,
N state size, G groups (ssd); D channels, N state size (selective_scan).
"""

from torch import Tensor

from statex.ops.backends import choose
from statex.ops.validation import (
    check_gated_delta,
    check_gated_delta_step,
    check_generalized_delta,
    check_generalized_delta_step,
    check_gla,
    check_gla_step,
    check_selective_scan,
    check_selective_scan_step,
    check_ssd,
    check_ssd_step,
)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t.

    Source: arXiv 2312.06635, section 4.

    Args:
        q, k, log_decay: [B, T, H, K]; log_decay <= 0, natural logarithm, one per key channel.
        v: [B, T, H, V].
        scale: factor on the output, K**-0.5 by default.
        initial_state: [B, H, K, V], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; B must be 1 and the states are
            [S, H, K, V]. The state is reset at each border.
        backend: "auto", "torch" or "triton"; "auto" follows `use_backend`, else takes triton for CUDA tensors.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state (fp32; fp64 for fp64 inputs) or None.

    Raises:
        ValueError: a shape or dtype is wrong, or the backend is unknown or cannot run here.
    """
    check_gla(q, k, v, log_decay, initial_state, cu_seqlens)
    return choose("gla", backend, v)(
        q,
        k,
        v,
        log_decay,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule:
    S'_t = diag(exp(log_decay_t)) S_{t-1};  S_t = S'_t + beta_t k_t^T (v_t - k_t S'_t);  o_t = scale q_t S_t.

    Sources: arXiv 2412.06464, equation 10; a decay for each channel: arXiv 2510.26692, equation 1.

    Args:
        q, k: [B, T, H, K]; beta_t |k_t|^2 above 2 makes the state grow without bound.
        v: [B, T, H, V].
        log_decay: [B, T, H], or [B, T, H, K] for one per key channel; <= 0, natural logarithm.
        beta: [B, T, H], how much of what the state has for a key is replaced: 0 to 1, or to 2.
        scale: factor on the output, K**-0.5 by default.
        initial_state: [B, H, K, V], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; B must be 1 and the states are
            [S, H, K, V]. The state is reset at each border.
        backend: as in `gla`.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state (fp32; fp64 for fp64 inputs) or None.

    Raises:
        ValueError: as `gla`.
    """
    check_gated_delta(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    return choose("gated_delta", backend, v)(
        q,
        k,
        v,
        log_decay,
        beta,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def generalized_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The generalised delta rule, whose rank-one update has two vectors of its own:
    S_t = diag(exp(log_decay_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t;  o_t = scale q_t S_t.

    Source: arXiv 2503.14456 (RWKV-7), section 4, with its state transposed.

    Args:
        q, k, a, b: [B, T, H, K]. RWKV-7's are a = -kk and b = kk * rate, with |kk| = 1 and rates from 0 to 1: others
            may make the state grow without bound.
        v: [B, T, H, V].
        log_decay: [B, T, H, K], <= 0, natural logarithm, one per key channel.
        scale: factor on the output, K**-0.5 by default.
        initial_state: [B, H, K, V], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; B must be 1 and the states are
            [S, H, K, V]. The state is reset at each border.
        backend: as in `gla`, but there is no Triton version: "auto" takes PyTorch's on every device.

    Returns:
        output [B, T, H, V] in the dtype of v, and the final state (fp32; fp64 for fp64 inputs) or None.

    Raises:
        ValueError: as `gla`.
    """
    check_generalized_delta(q, k, v, log_decay, a, b, initial_state, cu_seqlens)
    return choose("generalized_delta", backend, v)(
        q,
        k,
        v,
        log_decay,
        a,
        b,
        scale=scale,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def ssd(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """State space duality (Mamba2): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t.

    Source: arXiv 2405.21060, section 2.

    Args:
        x: [B, T, H, P].
        dt: [B, T, H], after softplus and clamping: positive.
        A: [H], negative.
        B, C: [B, T, G, N], G divides H; head h reads group h // (H // G).
        D: [H] or None.
        initial_state: [B, H, P, N], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; the batch must be 1 and the states
            are [S, H, P, N]. The state is reset at each border.
        backend: "auto", "torch" or "triton"; "auto" follows `use_backend`, else takes triton for CUDA tensors.

    Returns:
        output [B, T, H, P] in the dtype of x, and the final state (fp32; fp64 for fp64 inputs) or None.

    Raises:
        ValueError: a shape or dtype is wrong, or the backend is unknown or cannot run here.
    """
    check_ssd(x, dt, A, B, C, D, initial_state, cu_seqlens)
    return choose("ssd", backend, x)(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def selective_scan(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The selective scan (Mamba): S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t, with a decay of
    its own for each element of the state.

    Source: arXiv 2312.00752, equation 2.

    Args:
        x: [B, T, D].
        dt: [B, T, D], after softplus: positive.
        A: [D, N], negative.
        B, C: [B, T, N], which all channels share.
        D: [D] or None.
        initial_state: [B, D, N], zeros by default.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [S + 1] int, the borders of S segments packed in one row; the batch must be 1 and the states
            are [S, D, N]. The state is reset at each border.
        backend: as in `gla`, but there is no Triton version: "auto" takes PyTorch's on every device.

    Returns:
        output [B, T, D] in the dtype of x, and the final state (fp32; fp64 for fp64 inputs) or None. They have first
        derivatives, but no second ones.

    Raises:
        ValueError: a shape or dtype is wrong, or the backend is unknown or cannot run here.
    """
    check_selective_scan(x, dt, A, B, C, D, initial_state, cu_seqlens)
    return choose("selective_scan", backend, x)(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `gla`, in place on the state.

    Args:
        q, k, log_decay: [B, H, K].
        v: [B, H, V].
        state: [B, H, K, V], updated in place.
        scale: factor on the output, K**-0.5 by default.
        backend: as in `gla`.

    Returns:
        output [B, H, V] in the dtype of v.

    Raises:
        ValueError: as `gla`.
    """
    check_gla_step(q, k, v, log_decay, state)
    return choose("gla_step", backend, v)(q, k, v, log_decay, state, scale=scale)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `gated_delta`, in place on the state.

    Args:
        q, k: [B, H, K].
        v: [B, H, V].
        log_decay: [B, H], or [B, H, K] for one per key channel.
        beta: [B, H].
        state: [B, H, K, V], updated in place.
        scale: factor on the output, K**-0.5 by default.
        backend: as in `gla`.

    Returns:
        output [B, H, V] in the dtype of v.

    Raises:
        ValueError: as `gla`.
    """
    check_gated_delta_step(q, k, v, log_decay, beta, state)
    return choose("gated_delta_step", backend, v)(q, k, v, log_decay, beta, state, scale=scale)


def generalized_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `generalized_delta`, in place on the state.

    Args:
        q, k, log_decay, a, b: [B, H, K].
        v: [B, H, V].
        state: [B, H, K, V], updated in place.
        scale: factor on the output, K**-0.5 by default.
        backend: as in `generalized_delta`.

    Returns:
        output [B, H, V] in the dtype of v.

    Raises:
        ValueError: as `gla`.
    """
    check_generalized_delta_step(q, k, v, log_decay, a, b, state)
    return choose("generalized_delta_step", backend, v)(q, k, v, log_decay, a, b, state, scale=scale)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `ssd`, in place on the state.

    Args:
        x: [B, H, P].
        dt: [B, H], after softplus and clamping; before its bias and softplus where `dt_bias` is given.
        A: [H], negative.
        B, C: [B, G, N].
        state: [B, H, P, N], updated in place.
        D: [H] or None.
        dt_bias: [H] or None; with it dt becomes softplus(dt + dt_bias).
        backend: as in `ssd`.

    Returns:
        output [B, H, P] in the dtype of x.

    Raises:
        ValueError: as `ssd`.
    """
    check_ssd_step(x, dt, A, B, C, state, D, dt_bias)
    return choose("ssd_step", backend, x)(x, dt, A, B, C, state, D=D, dt_bias=dt_bias)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    *,
    D: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One token of `selective_scan`, in place on the state.

    Args:
        x: [B, D].
        dt: [B, D], after softplus: positive.
        A: [D, N], negative.
        B, C: [B, N].
        state: [B, D, N], updated in place.
        D: [D] or None.
        backend: as in `selective_scan`.

    Returns:
        output [B, D] in the dtype of x.

    Raises:
        ValueError: as `selective_scan`.
    """
    check_selective_scan_step(x, dt, A, B, C, state, D)
    return choose("selective_scan_step", backend, x)(x, dt, A, B, C, state, D=D)
