"""Cross-entropy straight from hidden states, a chunk of tokens at a time, so that no T x vocabulary logits exist.

Shape letters: N tokens that are scored, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from statex.data.recall import IGNORED
from statex.errors import UserError


def _entropies(
    logits: torch.Tensor, targets: torch.Tensor, with_gradient: bool, some_ignored: bool, soft_cap: float | None
) -> tuple:
    """The sum of the cross-entropies of logits [chunk, V] at targets [chunk, 1], and its gradient in their dtype.

    Args:
        some_ignored: whether targets may be -100.
        soft_cap: c, where the model's logits are c tanh(logits / c).
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if soft_cap is not None:
        tanh = torch.tanh(precise / soft_cap)
        precise = soft_cap * tanh
    log_normalizer = precise.logsumexp(-1, keepdim=True)
    if some_ignored:
        is_scored, targets = targets != IGNORED, targets.clamp_min(0)
        total = torch.where(is_scored, log_normalizer - precise.gather(-1, targets), 0).sum()
    else:
        total = (log_normalizer - precise.gather(-1, targets)).sum()
    if not with_gradient:
        return total, None
    if torch.compiler.is_compiling():  # in the same pass over the logits; by itself it would take two of its own
        is_target = torch.arange(logits.shape[-1], device=logits.device) == targets
        difference = (precise - log_normalizer).exp() - is_target.to(precise.dtype)
    else:
        difference = precise.sub_(log_normalizer).exp_()
        difference.scatter_add_(-1, targets, difference.new_full(targets.shape, -1.0))
    if some_ignored:
        difference = torch.where(is_scored, difference, 0)
    if soft_cap is not None:
        difference = difference * (1 - tanh.square())
    return total, difference.to(logits.dtype)


@functools.cache
def _compiled_entropies() -> Callable[..., tuple]:
    """Made when first needed: torch.compile imports its compiler, which takes seconds."""
    return torch.compile(_entropies, dynamic=True, fullgraph=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropy of `hidden @ weight.T`; its gradients are formed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, entropies, *options):
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        precise = torch.promote_types(hidden.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        total = hidden.new_zeros((), dtype=precise)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = hidden[rows] @ weight.T  # [chunk, V]
            loss, difference = entropies(logits, targets[rows, None], needs_hidden or needs_weight, *options)
            total += loss
            if difference is None:
                continue
            if grad_hidden is not None:
                torch.mm(difference, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += difference.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = [None if grad is None else grad * grad_total.to(grad.dtype) for grad in (grad_hidden, grad_weight)]
        return *scaled, None, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int = 4096,
    compiled: bool = False,
    masked: bool = False,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Sum over tokens of the cross-entropy of `hidden @ weight.T` against `targets`, in nats.

    Args:
        hidden: [..., D].
        weight: [V, D], the language-model head.
        targets: [...] int64; -100 is ignored.
        chunk: tokens whose logits, [chunk, V] in fp32 (fp64 of fp64 inputs), exist at one time.
        compiled: whether torch.compile fuses what is done to the logits.
        masked: compute the logits of ignored tokens too. Nothing then depends on how many are scored, for which the
            host would wait, and a CUDA graph cannot.
        soft_cap: c, of a head whose logits are c tanh(hidden @ weight.T / c).
    """
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if not masked:
        scored = targets != IGNORED
        rows, targets = rows[scored], targets[scored]
    if torch.is_autocast_enabled(rows.device.type):
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        entropies = _compiled_entropies() if compiled else _entropies
        return _LinearCrossEntropy.apply(rows, weight.to(rows.dtype), targets, chunk, entropies, masked, soft_cap)


def _is_fla(model: Any) -> bool:
    """Whether a model is flash-linear-attention's, which computes its loss in a method of its own."""
    is_fla = any(each.__module__.startswith("fla.") for each in type(model).__mro__)
    if is_fla and not hasattr(model, "_compute_logits_and_loss"):
        problem = "is of a flash-linear-attention that computes its loss in another way, not known here"
        raise UserError("model", type(model).__name__, problem, "install the version that docs/families.md names")
    return is_fla


@contextmanager
def chunked_loss(model: Any, chunk: int, compiled: bool = False, masked: bool = False) -> Iterator[None]:
    """Inside this context, `model(input_ids, labels=...)` computes its loss by `linear_cross_entropy`, for any family.

    The head hands the hidden states through, and the loss function, which gets them for logits, does the head's work;
    so data-parallel wrappers around the model's forward see nothing unusual. A head may have a `soft_cap`. Factors on
    logits may stand before the head as well as behind it.

    Raises:
        UserError: the model's own loss has a part that is made from its logits, or its head is not a linear layer
            without a bias, or the model is of an unknown version of flash-linear-attention.
    """
    for field, none in (("z_loss_coefficient", 0), ("use_l2warp", False)):
        if value := getattr(model.config, field, none):
            problem = "adds a loss that is made from all logits, which are never there at once"
            raise UserError(field, value, problem, f"set it to {str(none).lower()} in the model's config.json")
    head = model.get_output_embeddings()
    soft_cap = getattr(head, "soft_cap", None)
    if head.bias is not None or (type(head).forward is not nn.Linear.forward and soft_cap is None):
        problem = "is not a linear layer without a bias, so that its loss cannot be computed in chunks"
        raise UserError("model", f"the head {type(head).__name__}", problem, "use a model with such a head")

    def loss_function(logits, labels, vocab_size=None, num_items_in_batch=None, shift_labels=None, **kwargs):
        targets = shift_labels
        if targets is None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
        total = linear_cross_entropy(
            logits, head.weight, targets, chunk=chunk, compiled=compiled, masked=masked, soft_cap=soft_cap
        )
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count

    def logits_and_loss(hidden_states, labels=None, logits_to_keep=0, *, shift_labels=None, num_items_in_batch=None):
        """flash-linear-attention's models have this method in the place of a loss function."""
        if labels is None and shift_labels is None:
            return None, hidden_states
        return loss_function(hidden_states, labels, None, num_items_in_batch, shift_labels), hidden_states

    is_fla = _is_fla(model)
    had_own = "forward" in head.__dict__
    before, own_loss = head.__dict__.get("forward"), model.__dict__.get("_loss_function")
    head.forward = nn.Identity().forward
    model.loss_function = loss_function
    if is_fla:
        model._compute_logits_and_loss = logits_and_loss
    try:
        yield
    finally:
        if is_fla:
            del model._compute_logits_and_loss
        if had_own:
            head.forward = before
        else:
            del head.forward
        if own_loss is None:
            del model._loss_function
        else:
            model._loss_function = own_loss
