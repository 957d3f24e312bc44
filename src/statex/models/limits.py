"""How many tokens a model can read, and the refusal of more: the same in training, evaluation and their checks."""

from typing import Any

from statex.errors import UserError
from statex.models.documents import has_attention


def context_limit(model: Any, attends: bool | None = None) -> int | None:
    """The most tokens a model can read: its max_position_embeddings if it has attention, else None.

    Args:
        model: a causal language model, also on the meta device.
        attends: whether it has attention; default: what its class says, which only those of transformers do.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    attends = has_attention(model.base_model) if attends is None else attends
    return limit if attends else None


def require_context(field: str, value: Any, tokens: int, limit: int | None, model: str = "") -> None:
    """Refuse what asks a model to read more tokens than it can; nothing is ever truncated.

    Args:
        field, value: what asks for it, as the user wrote it.
        tokens: how many have to be read.
        limit: of `context_limit`.
        model: what the recipe calls the model.

    Raises:
        UserError: they are more than the limit.
    """
    if limit is None or tokens <= limit:
        return
    name = f"max_position_embeddings of {model}" if model else "max_position_embeddings"
    what = f"more than the {limit} tokens that this model's attention can read ({name})"
    problem = f"is {what}" if tokens == value else f"takes {tokens} tokens, {what}"
    remedy = f"ask for at most {limit} tokens, or raise max_position_embeddings in the model's configuration"
    raise UserError(field, value, problem, remedy)
