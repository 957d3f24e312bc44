"""Refuse values of a configuration that describe no model, before transformers uses them."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from transformers.activations import ACT2FN

from statex.errors import UserError
from statex.expansion.config import user_error
from statex.families import Family

NOT_SUPPORTED = (
    "quantization_config", "compression_config", "text_config", "text_encoder", "decoder", "generator",
    "is_encoder_decoder", "per_layer_config", "attn_implementation", "_attn_implementation",
    "experts_implementation", "configuration_files", "transformers_weights",
)  # fmt: skip
"""Keys by which transformers reads other weights, other code or another configuration than the folder's own."""
SET_BY_TRANSFORMERS = {"model_type", "num_labels", "torch_dtype", "name_or_path", "output_attentions", "rope_scaling"}
"""Attributes of its configuration classes that are not fields, but that transformers takes from a file."""


def check_fields(family: Family, config_class: type, values: Mapping[str, Any]) -> None:
    """Raise UserError, with field and value, unless `values` can be those of a configuration of the family.

    Args:
        config_class: the configuration's class; its defaults stand in for what `values` omit.
        values: as a config.json or a recipe has them.
    """
    defaults = defaults_of(config_class)
    for name, value in values.items():
        if name in NOT_SUPPORTED and value not in (None, False):
            raise UserError(name, value, f"is not supported for models of type {family.model_type}", "remove it")
        known = name in defaults or name in family.fields.model_fields
        known = known or name in SET_BY_TRANSFORMERS or name in NOT_SUPPORTED
        if not known and hasattr(config_class, name):
            raise UserError(name, value, "would overwrite an attribute of the configuration's class", "remove it")
    try:
        family.fields.model_validate(defaults | dict(values))
    except ValidationError as error:
        raise user_error(error) from None
    activation = values.get("hidden_act")
    if activation is not None and activation not in list(ACT2FN):
        raise UserError("hidden_act", activation, "is not an activation that transformers knows", "correct it")


def defaults_of(config_class: type) -> dict[str, Any]:
    """The values of a configuration's fields where none are given; FLA's classes have them in a constructor alone."""
    parameters = inspect.signature(config_class).parameters.values()
    written = {each.name: each.default for each in parameters if each.default is not each.empty}
    return written | {each.name: each.default for each in dataclasses.fields(config_class)}  # type: ignore[arg-type]
