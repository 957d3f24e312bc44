"""Read the configuration of a model folder."""

import os
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig

from statex.checkpoint.fla import FLA_MODEL_TYPE, from_fla
from statex.checkpoint.folder import model_folder, read_json
from statex.errors import UserError
from statex.families import family_of, unknown_family
from statex.models.gla.configuration import GLAConfig
from statex.models.registration import register_configurations


def load_config(folder: str | os.PathLike) -> Any:
    """The configuration of a model folder; FLA's `gla` becomes our `statex_gla`.

    Raises:
        UserError: no config.json, damaged JSON, an unknown family or a value that the family refuses.
    """
    register_configurations()
    path = model_folder(folder) / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    try:
        if model_type == FLA_MODEL_TYPE:
            config = GLAConfig.from_dict(from_fla(values))
        elif model_type in list(CONFIG_MAPPING):
            config = AutoConfig.from_pretrained(path.parent)
        else:
            raise unknown_family(model_type)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        cause = error.__cause__ or error  # a strict configuration's message says only which check failed
        if isinstance(cause, UserError):
            raise cause from None
        problem = f"is refused: {' '.join(str(cause).split())}".rstrip(".")
        raise UserError("config.json", str(path), problem, "correct the configuration") from error
    family_of(config)
    return config
