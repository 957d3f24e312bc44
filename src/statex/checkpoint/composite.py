"""Folders of models of text and images, of whose language model statex makes a model of its own."""

from typing import Any

from statex.checkpoint.headers import TensorHeader
from statex.errors import UserError
from statex.families import FAMILIES, Family

LANGUAGE_MODEL, VISION = "model.language_model.", "model.visual."


def is_composite(values: dict[str, Any]) -> bool:
    """Whether a config.json is of such a model."""
    model_type = values.get("model_type")
    return isinstance(model_type, str) and any(family.composite == model_type for family in FAMILIES.values())


def language_model_values(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of its language model, whose word embeddings are tied where the whole model says so:
    that is how transformers saves the weights.

    Raises:
        UserError: there is none in `text_config`.
    """
    text = values.get("text_config")
    if not isinstance(text, dict):
        problem = "does not hold the language model's configuration"
        raise UserError("config.json: text_config", text, problem, "restore it from the source")
    model_type = next(name for name, family in FAMILIES.items() if family.composite == values["model_type"])
    of_all = {name: values[name] for name in ("dtype", "torch_dtype", "quantization_config") if name in values}
    tied = {name: values[name] for name in ("tie_word_embeddings",) if name in values}
    return of_all | text | tied | {"model_type": model_type}


def language_model_headers(family: Family, headers: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    """A folder's headers under the names of the language model alone, without what reads images.

    transformers also saves a language model under those names that was loaded from a model of text and images.
    """
    if not family.composite:
        return headers
    return {
        name.replace(LANGUAGE_MODEL, "model.", 1) if name.startswith(LANGUAGE_MODEL) else name: header
        for name, header in headers.items()
        if not name.startswith(VISION)
    }
