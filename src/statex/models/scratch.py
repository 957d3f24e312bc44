"""Models made from scratch, with random weights, for a recipe that pre-trains its own."""

from dataclasses import fields as fields_of
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from statex.errors import UserError, explained
from statex.families import FAMILIES
from statex.models.fields import check_fields
from statex.models.registration import register_families

BOUNDS = {
    "num_hidden_layers": range(1, 257), "chunk_size": range(1, 65_537), "conv_size": range(1, 257),
    "conv_kernel": range(1, 257),
}  # fmt: skip
"""Bounds of fields that cost time or memory before, or without, affecting any tensor."""
NOT_FROM_RECIPES = {"expansion": "is set by the arms"}


def make_config(family: str | None, fields: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    """The configuration of a known family with these fields, and the vocabulary of `tokenizer`.

    Raises:
        UserError: an unknown family, a field that is not of its architecture, one that follows from the tokenizer, or
            values that the family refuses.
    """
    register_families()
    if family not in FAMILIES:
        raise UserError("family", family, "is unknown", f"known families: {', '.join(FAMILIES)}")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    from_tokenizer = {"vocab_size": len(tokenizer)} | ids
    general = {field.name for field in fields_of(PreTrainedConfig)}  # of any model: its outputs, its labels, its dtype
    known = {field.name for field in fields_of(type(AutoConfig.for_model(family)))} - general
    for name, value in fields.items():
        if name in from_tokenizer:
            raise UserError(f"config.{name}", value, "follows from the tokenizer", "remove it (see data.tokenizer)")
        if name in NOT_FROM_RECIPES:
            raise UserError(f"config.{name}", value, NOT_FROM_RECIPES[name], "remove it")
        if name not in known:
            raise UserError(f"config.{name}", value, f"is not a field of the architecture of {family}", "remove it")
        if name in BOUNDS and not (isinstance(value, int) and value in BOUNDS[name]):
            bounds = f"{BOUNDS[name].start} to {BOUNDS[name].stop - 1}"
            raise UserError(f"config.{name}", value, f"is not a number from {bounds}", "give one")
    try:
        check_fields(FAMILIES[family], type(AutoConfig.for_model(family)), from_tokenizer | fields)
    except UserError as error:
        raise UserError(f"config.{error.field}", error.value, error.problem, error.remedy) from None
    with explained("config", fields, f"does not make a {family}", "correct the values"):
        return AutoConfig.for_model(family, **from_tokenizer, **fields)


def make_model(family: str | None, fields: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    """A model of a known family with random weights, from torch's random state; otherwise as `make_config`."""
    model = AutoModelForCausalLM.from_config(make_config(family, fields, tokenizer))
    known = FAMILIES[model.config.model_type]
    for index in known.recurrent_layers(model.config):
        known.initialize_mixer(model.get_submodule(known.mixer_name(model.config, index)))
    return model
