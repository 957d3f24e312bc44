"""Packed documents in transformers' models: how they are kept apart, in the recurrence and in attention beside it.

Letters: B batch, T time.
"""

from typing import Any

import torch
from transformers.masking_utils import (
    create_causal_mask,
    create_recurrent_attention_mask,
    packed_sequence_mask_function,
)

from statex.ops.segments import cu_seqlens_of

MASKING = ("eager", "sdpa", "flex_attention")
"""Implementations of attention that take a mask of any form."""


def has_attention(base_model: Any) -> bool:
    """Whether some layers of a model (or class) of transformers have attention."""
    return "attentions" in (base_model._can_record_outputs or {})


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
