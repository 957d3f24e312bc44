"""What several families do alike."""

from typing import Any

from statex.errors import UserError

INHERIT_NOISE = 0.3
"""Bare copies of rows get equal gradients and never diverge; with this share of noise they do."""

ACTIVATIONS = ("silu", "swish")
"""Those of the convolution that statex's ops have."""

ONE_RATE = "would need one decay rate and one rate of writing in the place of several heads' own"
"""The `merging_needs` of the delta rule's families: both are numbers of a head."""

FURTHER_TOKENS = "the layers that predict further tokens (MTP)"
"""The `left_out` of families whose checkpoints may have such."""

RECURRENT_TYPES = ("linear_attention", "hybrid")
"""transformers' names for a layer with a recurrent state, alone or beside attention."""


ZERO_AT_ZERO = ("silu", "swish", "gelu")
"""Activations with f(0) = 0 and f'(0) != 0: rows of zeros before them add nothing and still learn."""


def require_a_type_each(fields: Any) -> None:
    """Raise UserError where `layer_types` are not as many as the layers."""
    if fields.layer_types is not None and len(fields.layer_types) != fields.num_hidden_layers:
        problem = f"is not one type for each of num_hidden_layers = {fields.num_hidden_layers} layers"
        raise UserError("layer_types", fields.layer_types, problem, "list as many")


def layers_of_types(config: Any, *types: str) -> list[int]:
    """The layers whose entry in the configuration's `layer_types` is one of `types`."""
    return [index for index, kind in enumerate(config.layer_types) if kind in types]


def require_silu(config: Any, field: str) -> None:
    """Raise UserError where the convolution's activation is another than the one that statex's ops have."""
    if getattr(config, field) not in ACTIVATIONS:
        problem = "is not supported by statex's convolution, which has SiLU only"
        raise UserError(field, getattr(config, field), problem, f"use one of {', '.join(ACTIVATIONS)}")


def refuse_rank(rank: int | None) -> None:
    """Raise UserError where a rank is given."""
    if rank is not None:
        raise UserError("rank", rank, "low-rank growth exists only for GLA", "leave rank out")
