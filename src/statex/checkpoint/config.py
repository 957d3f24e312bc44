"""Read the configuration of a model folder, and check it against the headers of the weights."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from statex.checkpoint.composite import is_composite, language_model_headers, language_model_values
from statex.checkpoint.fla import FOREIGN_TYPES, from_foreign
from statex.checkpoint.folder import check_plain, model_folder, read_json
from statex.checkpoint.headers import TensorHeader, read_headers
from statex.checkpoint.tensors import check_tensors
from statex.errors import UserError, explained
from statex.families import Family, family_of, unknown_family
from statex.models.fields import check_fields, defaults_of
from statex.models.registration import register_families


@dataclass(frozen=True)
class Description:
    """A model folder without its weights: its configuration and headers, which agree."""

    folder: Path
    config: Any
    headers: dict[str, TensorHeader]


def load_config(folder: str | os.PathLike) -> Any:
    """The configuration of a model folder; FLA's `gla` and `rwkv7` become our `statex_gla` and `statex_rwkv7`,
    transformers' `xlstm` our `statex_xlstm`; of a `qwen3_5` it is its language model's.

    Raises:
        UserError: as `describe`.
    """
    return describe(folder).config


def describe(folder: str | os.PathLike) -> Description:
    """Read a folder's configuration and headers, no weights, and refuse it unless they describe one model.

    Sizes are compared before anything is built, so that a wrong number in a damaged file costs neither time nor memory.

    Raises:
        UserError: no config.json, damaged JSON, an unknown family, a value that the family refuses, weights that are
            not safetensors, a truncated file, a tensor that is missing, unexpected, of another shape or not of a
            floating type, or a stored plan that is not this model's.
    """
    register_families()
    folder = model_folder(folder)
    values = read_json(folder / "config.json")
    is_foreign = any(values.get("model_type") == name for name in FOREIGN_TYPES)  # not checked yet: any type
    if is_foreign:
        values = from_foreign(values)
    elif is_composite(values):
        is_foreign, values = True, language_model_values(values)
    config_class = _config_class(values)
    family: Family = family_of(config_class)
    headers = language_model_headers(family, read_headers(folder))
    with _named_by_file():
        check_plain(values)
        check_fields(family, config_class, values)
        _check_sizes(family, family.fields.by_present_names(defaults_of(config_class) | values), headers)
        with explained("config.json", str(folder / "config.json"), "is refused", "correct the configuration"):
            if is_foreign:
                config = config_class.from_dict(values)
            else:
                config = config_class.from_pretrained(folder, trust_remote_code=False, name_or_path=str(folder))
        check_tensors(config, headers, folder)
    _check_generation(folder)
    return Description(folder, config, headers)


def _check_generation(folder: Path) -> None:
    """Raise UserError where transformers could not read the generation settings when it loads the weights."""
    if (path := folder / GENERATION_CONFIG_NAME).exists():
        values = read_json(path)
        with explained(path.name, str(path), "is refused", "correct it or remove it"):
            GenerationConfig.from_dict(values)


def _config_class(values: dict[str, Any]) -> Any:
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unknown_family(model_type)
    return CONFIG_MAPPING[model_type]


@contextmanager
def _named_by_file() -> Iterator[None]:
    """Prefix the field of an error with config.json."""
    try:
        yield
    except UserError as error:
        in_file = error.field in ("config.json", "model")
        field = error.field if in_file else f"config.json: {error.field}"
        raise UserError(field, error.value, error.problem, error.remedy) from error


def _check_sizes(family: Family, values: dict[str, Any], headers: dict[str, TensorHeader]) -> None:
    """Raise UserError for more (or fewer) layers than the weights have, or a size longer than any of their tensors."""
    remedy = "correct config.json, or fetch the weights that belong to it"
    list_of_layers = family.mixer_path.partition(".{}")[0].rpartition(".")[2]  # under whatever name of the base model
    layers = {found[1] for name in headers if (found := re.match(rf"\w+\.{list_of_layers}\.(\d+)\.", name))}
    num_layers = family.num_layers(values)
    if not num_layers <= len(layers) <= num_layers + family.num_layers_left_out(values):
        raise UserError("num_hidden_layers", num_layers, f"the weights have {len(layers)} layers", remedy)
    longest = max((size for header in headers.values() for size in header.shape), default=0)
    for name in family.fields.tensor_sizes:
        if (value := values.get(name)) is not None and value > longest:
            raise UserError(name, value, f"no tensor of the weights is longer than {longest}", remedy)
