"""Models made from scratch, with random weights, for a recipe that pre-trains its own."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from statex.errors import UserError
from statex.families import FAMILIES


def make_model(family: str | None, fields: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """A model of a known family with these fields of its configuration and the vocabulary of `tokenizer`.

    Raises:
        UserError: an unknown family, an unknown field, or values that the family refuses.
    """
    if family not in FAMILIES:
        raise UserError("family", family, "is unknown", f"known families: {', '.join(FAMILIES)}")
    known = set(AutoConfig.for_model(family).to_dict())
    if unknown := sorted(set(fields) - known):
        raise UserError("config", unknown[0], f"is no field of the configuration of {family}", "correct its name")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **fields)
    except (ValueError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError("config", fields, f"does not make a {family} ({message})", "correct the values") from None
    return AutoModelForCausalLM.from_config(config)
