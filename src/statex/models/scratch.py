"""Models made from scratch, with random weights, for a recipe that pre-trains its own."""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from statex.errors import UserError
from statex.families import FAMILIES
from statex.models.registration import register_configurations


def make_config(family: str | None, fields: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """The configuration of a known family with these fields, and the vocabulary of `tokenizer`.

    Raises:
        UserError: an unknown family, an unknown field, one that follows from the tokenizer, or values that the family
            refuses.
    """
    register_configurations()
    if family not in FAMILIES:
        raise UserError("family", family, "is unknown", f"known families: {', '.join(FAMILIES)}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    from_tokenizer = {"vocab_size": len(tokenizer)} | ids
    known = set(AutoConfig.for_model(family).to_dict())
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"config.{name}", value, f"is no field of the configuration of {family}", "correct it")
        if name in from_tokenizer:
            raise UserError(f"config.{name}", value, "follows from the tokenizer", "remove it (see data.tokenizer)")
    try:
        return AutoConfig.for_model(family, **from_tokenizer, **fields)
    except (ValueError, TypeError, StrictDataclassError) as error:
        message = " ".join(str(error.__cause__ or error).split())
        raise UserError("config", fields, f"does not make a {family} ({message})", "correct the values") from None


def make_model(family: str | None, fields: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """A model of a known family with random weights, from torch's random state; otherwise as `make_config`."""
    return AutoModelForCausalLM.from_config(make_config(family, fields, tokenizer))
