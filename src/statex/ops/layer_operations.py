"""The public operations around a recurrence in its layer: check the arguments, then run what `backends` chooses.

Shape letters: B batch, T time, D channels, W taps.
"""

from torch import Tensor

from statex.ops.backends import choose
from statex.ops.validation import check_gated_rms_norm, check_short_convolution, check_short_convolution_step


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    left_context: Tensor | None = None,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """SiLU of a causal depthwise convolution: `y_t = silu(sum_w weight[:, w] x_{t - W + 1 + w} + bias)`.

    Args:
        x: inputs, [B, T, D]; a view of a wider tensor is read where it is.
        weight: taps, [D, W].
        bias: [D].
        left_context: the inputs before `x`, [B, any, D]; zeros without it.
        seq_idx: [B, T], at least 0, the document of each position; a tap never reaches into another document, nor
            into `left_context`.
        backend: as in `gla`.

    Returns:
        [B, T, D] in the dtype of x.

    Raises:
        ValueError: as `gla`.
    """
    check_short_convolution(x, weight, bias, left_context, seq_idx)
    return choose("short_convolution", backend, x)(x, weight, bias, left_context=left_context, seq_idx=seq_idx)


def short_convolution_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """One token of `short_convolution`, in place on the inputs that it still needs.

    Args:
        x: [B, D].
        state: the last W inputs, zeros before the first, [B, D, W]; updated in place.
        weight: taps, [D, W].
        bias: [D].
        backend: as in `gla`.

    Returns:
        [B, D] in the dtype of x.

    Raises:
        ValueError: as `gla`.
    """
    check_short_convolution_step(x, state, weight, bias)
    return choose("short_convolution_step", backend, x)(x, state, weight, bias)


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    gate_first: bool = False,
    backend: str = "auto",
) -> Tensor:
    """RMSNorm with a gate, in fp32 (fp64 for fp64 inputs): `rmsnorm(x) weight silu(gate)`, or, with `gate_first`,
    `rmsnorm(x silu(gate)) weight`.

    Sources: the output norms of GLA (arXiv 2312.06635) and of Mamba2 (arXiv 2405.21060).

    Args:
        x: [..., D].
        weight: [D]; 1 without it.
        gate: as x; no gate without it.
        eps: added to the mean square.
        group_size: channels that are normalised together, a divisor of D; all by default.
        gate_first: whether the gate is applied before the norm.
        backend: as in `gla`.

    Returns:
        as x, in its dtype.

    Raises:
        ValueError: as `gla`.
    """
    check_gated_rms_norm(x, weight, gate, group_size)
    return choose("gated_rms_norm", backend, x)(x, weight, gate, eps=eps, group_size=group_size, gate_first=gate_first)
