"""What transformers' models with attention beside recurrence are given: masks and positions of packed documents, and
those of models none of whose layers has attention.

Letters: B batch, T time.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    packed_sequence_mask_function,
)

from statex.models.keywords import by_name
from statex.ops.segments import cu_seqlens_of

MASKING = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that take a mask of any form."""
WITHOUT_ATTENTION = ("linear_attention", "mlp", "moe")
"""The kinds of layers, as `layer_types` has them, that have no attention."""


def has_attention(base_model: Any) -> bool:
    """Whether some layers of a model of transformers have attention; of a class, whether a model of it may have any."""
    if "attentions" not in (base_model._can_record_outputs or {}):
        return False
    kinds = None if isinstance(base_model, type) else getattr(base_model.config, "layer_types", None)
    return not kinds or any(kind not in WITHOUT_ATTENTION for kind in kinds)


def lacks_attention(base_model: Any) -> bool:
    """Whether a model of transformers has no attention, though others of its class do."""
    return has_attention(type(base_model)) and not has_attention(base_model)


def arguments_without_attention(
    base_model: Any, tokens: torch.Tensor, attention_mask: Any = None, position_ids: Any = None
) -> dict[str, Any]:
    """Arguments of the forward of transformers' base model that lacks attention: without them it would ask its cache,
    which counts no tokens then, how many it holds. No layer reads the positions.

    Args:
        tokens: input_ids [B, T] or inputs_embeds [B, T, D].
        attention_mask, position_ids: as the model takes them.
    """
    if position_ids is None:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if not isinstance(attention_mask, dict):
        mask = create_recurrent_attention_mask(base_model.config, tokens, attention_mask)
        attention_mask = {"full_attention": None, "linear_attention": mask}
    return {"position_ids": position_ids, "attention_mask": attention_mask}


def knowing_no_attention(forward: Callable) -> Callable:
    """The forward of transformers' base model, which may have attention, with `arguments_without_attention`."""
    _, *names, _ = inspect.signature(forward).parameters

    @functools.wraps(forward)
    def with_arguments(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = by_name(names, args, kwargs)
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is not None and lacks_attention(self):
            given |= arguments_without_attention(self, tokens, given.get("attention_mask"), given.get("position_ids"))
        return forward(self, **given)

    return with_arguments


def document_arguments(
    base_model: Any, tokens: torch.Tensor, seq_idx: torch.Tensor, attention_mask: Any = None
) -> dict[str, Any]:
    """Arguments of the forward of transformers' base model by which each document stays apart, on statex's ops.

    Args:
        tokens: input_ids [B, T] or inputs_embeds [B, T, D].
        seq_idx: [B, T], which document each token belongs to.
        attention_mask: [B, T], 0 at padding, as the model takes it.

    Raises:
        ValueError: the attention in use takes no mask of documents, or a model of fla drops them.
    """
    if type(base_model).__module__.startswith("fla."):
        raise ValueError(f"seq_idx: {type(base_model).__name__} of fla drops it; load the model with statex.load")
    borders = {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens_of(seq_idx)}  # computed once for all layers
    if lacks_attention(base_model):
        return borders | arguments_without_attention(base_model, tokens, attention_mask)
    if not has_attention(base_model):
        return borders
    implementation = base_model.config._attn_implementation
    if implementation not in MASKING:
        raise ValueError(
            f"seq_idx: attention by {implementation!r} cannot keep packed documents apart; "
            f"load the model with attn_implementation as one of {', '.join(MASKING)}"
        )
    shape = torch.empty((*tokens.shape[:2], 0), dtype=base_model.dtype, device=tokens.device)  # as masks ask for it
    in_document = packed_sequence_mask_function(seq_idx)
    masks = {
        "full_attention": create_causal_mask(
            base_model.config, shape, attention_mask, None, and_mask_function=in_document
        ),
        "linear_attention": create_recurrent_attention_mask(base_model.config, shape, attention_mask),
    }
    return borders | {"position_ids": _positions(seq_idx), "attention_mask": masks}


def _positions(seq_idx: torch.Tensor) -> torch.Tensor:
    """[B, T], the place of each token in its document."""
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand(seq_idx.shape)
    begins = torch.ones_like(seq_idx, dtype=torch.bool)
    begins[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values
