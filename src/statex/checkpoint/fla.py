"""Folders of models that are statex's own here, FLA's `gla` and `rwkv7` and transformers' `xlstm`: their configuration
under our model_type, and our GLA in FLA's format."""

import json
import os
from typing import Any

from transformers import PreTrainedModel

from statex.errors import UserError
from statex.expansion.stored import stored_plan
from statex.families import OURS_ONLY
from statex.models.gla.configuration import GLAConfig
from statex.models.rwkv7.configuration import RWKV7Config
from statex.models.shim import SHIM
from statex.utils.atomic import new_folder

FLA_MODEL_TYPE = "gla"
FOREIGN_TYPES = {FLA_MODEL_TYPE: GLAConfig.model_type} | OURS_ONLY
"""Our model types, by FLA's and transformers'."""
ACTIVATIONS = {"sqrelu": "relu2"}
"""transformers' names of RWKV-7's activation, by FLA's."""
NOT_IN_FLA = ("expansion", "auto_map")


def from_foreign(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration under our model_type; fields that mean nothing here are carried along."""
    kept = {key: value for key, value in values.items() if key not in ("architectures", "auto_map")}
    model_type = FOREIGN_TYPES[values["model_type"]]
    if model_type == RWKV7Config.model_type and isinstance(activation := values.get("hidden_act"), str):
        kept["hidden_act"] = ACTIVATIONS.get(activation, activation)
    if isinstance(steps := values.get("expansion"), list):  # of FLA's own GLA, mixers made fresh
        theirs = values["model_type"]
        kept["expansion"] = [
            step | {"model_type": model_type} if isinstance(step, dict) and step.get("model_type") == theirs else step
            for step in steps
        ]
    return kept | {"model_type": model_type}


def export_fla(model: PreTrainedModel, out: str | os.PathLike) -> None:
    """Write an un-expanded GLA as a `gla` folder that flash-linear-attention loads.

    Raises:
        UserError: the model is not a GLA, is expanded (FLA's configuration cannot express that), or `out` exists.
    """
    if not isinstance(model.config, GLAConfig):
        raise UserError("model", model.config.model_type, "is not a GLA", "FLA's format is for statex_gla models only")
    plan = stored_plan(model.config)
    if plan is not None and plan.kind == "expand":
        raise UserError(
            "model", model.config.name_or_path or "statex_gla", "is expanded, which FLA's format cannot express",
            "keep it in its own format, with save_pretrained",
        )  # fmt: skip
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        (folder / f"{SHIM}.py").unlink()
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {key: value for key, value in values.items() if key not in NOT_IN_FLA}
        values |= {"model_type": FLA_MODEL_TYPE, "architectures": ["GLAForCausalLM"]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
