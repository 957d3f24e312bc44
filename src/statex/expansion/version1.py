"""Plans as the first version stored them, each edit in words: read, and converted to structured edits."""

import functools
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from statex.errors import UserError
from statex.expansion.config import Initialization, user_error
from statex.expansion.edits import RESTORE, Count, ExpansionPlan, LayerEdit, TensorEdit
from statex.expansion.initializers import INITIALIZERS
from statex.families import StateGeometry, family_of

_AS_STORED = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class _TensorInWords:
    name: str
    before: list[Count] | None
    after: list[Count]
    edit: str

    __pydantic_config__ = _AS_STORED


@dataclass(frozen=True)
class _LayerInWords:
    index: NonNegativeInt
    before: StateGeometry
    after: StateGeometry
    tensors: list[_TensorInWords]

    __pydantic_config__ = _AS_STORED


@dataclass(frozen=True)
class _PlanInWords:
    kind: Literal["expand", "reinitialize"]
    model_type: str
    init: Initialization
    factor: Count
    rank: Count | None
    seed: NonNegativeInt
    layers: Annotated[list[_LayerInWords], Field(min_length=1)]
    version: Literal[1]

    __pydantic_config__ = _AS_STORED


@functools.cache
def _stored_form() -> TypeAdapter[_PlanInWords]:
    return TypeAdapter(_PlanInWords)


def read_version_1(values: dict[str, Any], config: PreTrainedConfig) -> ExpansionPlan:
    """The plan that a configuration of the first version holds; it was the first and only step of its model.

    Raises:
        UserError: a value is missing, unknown or of another type, or words are not those of this expansion.
    """
    if values.get("version") != 1:
        problem = "is a single plan, but not of version 1; later ones are in a list"
        raise UserError("expansion.version", values.get("version"), problem, "update statex, or restore config.json")
    try:
        old = _stored_form().validate_json(json.dumps(values))
    except ValidationError as error:
        found = user_error(error)
        raise UserError(f"expansion.{found.field}", found.value, found.problem, RESTORE) from None
    family = family_of(config)
    mixer, norm = (path.partition("{}")[::2] for path in (family.mixer_path, family.norm_path))
    layers = []
    for layer in old.layers:
        before = after = family.geometry(config)
        if old.kind == "expand":
            after = family.expanded_geometry(config, before, old.factor, old.init)
        start = INITIALIZERS[old.init](family, config, before, after, old.rank)
        edits = []
        for tensor in layer.tensors:
            name = tensor.name.removeprefix(f"{mixer[0]}{layer.index}{mixer[1]}.")
            is_norm = tensor.name.startswith(f"{norm[0]}{layer.index}{norm[1]}.")
            edit = TensorEdit(tensor.name, tensor.before, tensor.after, "re-initialised" if is_norm else start(name))
            if edit.words != tensor.edit or not edit.fits:
                field, problem = (
                    f"expansion.layers.{layer.index}.tensors",
                    f"is not what {old.init} does to {tensor.name}",
                )
                raise UserError(field, tensor.edit, problem, RESTORE)
            edits.append(edit)
        layers.append(LayerEdit(layer.index, layer.before, layer.after, edits))
    return ExpansionPlan(old.kind, old.model_type, old.init, old.factor, old.rank, old.seed, layers)
