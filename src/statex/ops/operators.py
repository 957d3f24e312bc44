"""Operators of PyTorch's dispatcher: torch.compile takes each into its graph whole, forward and backward.

Where nothing is compiled they are bypassed: with gradients a call through the dispatcher costs 50 us more.

Shape letters: B batch, T time, S segments.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(schema: str, kernel: Callable, fake: Callable) -> Any:
    """Define the operator `statex::name` of a schema "name(arguments) -> results".

    `torch.library.custom_op` would do the same with twice the overhead per call.

    Args:
        kernel: computes the results on any device. They alias neither the arguments nor one another.
        fake: makes empty tensors of the same shapes, strides and dtypes; sizes may be symbols.

    Returns:
        The operator. It takes its arguments by position, and numbers as the schema has them.
    """
    name, _, rest = schema.partition("(")
    torch.library.define(f"statex::{name}", f"({rest}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"statex::{name}", "default", kernel)
    torch.library.register_fake(f"statex::{name}", fake)
    return getattr(torch.ops.statex, name).default


def needs_gradients(*inputs: Tensor | None) -> bool:
    """Whether what is computed of the inputs will have a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def contiguous(x: Tensor | None) -> Tensor | None:
    """An argument that may be absent, as kernels read it where they take no strides of it."""
    return None if x is None else x.contiguous()


def absent(like: Tensor) -> Tensor:
    """Stands for a result that does not exist: an operator always returns the same number of tensors."""
    return like.new_empty(0)


def num_states(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of states of [B, T, ...]: one per row, or one per segment. It may be a symbol."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
