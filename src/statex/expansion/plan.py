"""The plan of an expansion: every edit listed before any tensor is touched; stored in config.json, replayed on load."""

import functools
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from statex.errors import UserError
from statex.expansion.config import ExpansionConfig, Initialization, user_error
from statex.expansion.initializers import INITIALIZERS, RESETS_PRE_NORM
from statex.expansion.preconditions import require_expandable, require_mixer
from statex.families import Family, StateGeometry, TensorRows, family_of

PLAN_VERSION = 1

Count = Annotated[int, Field(ge=1, lt=2**31)]
_AS_STORED = ConfigDict(extra="forbid", strict=True)


RESTORE = "restore the model's config.json"


@dataclass(frozen=True)
class TensorEdit:
    """What becomes of one tensor: its full name, shapes before (None: it is new) and after, and the edit in words."""

    name: str
    before: list[Count] | None
    after: list[Count]
    edit: str

    __pydantic_config__ = _AS_STORED

    @property
    def is_fresh(self) -> bool:
        """Whether any of the tensor was changed or re-initialised; learning-rate multipliers apply to such tensors."""
        return self.edit != "kept"


@dataclass(frozen=True)
class LayerEdit:
    """One expanded (or re-initialised) layer."""

    index: NonNegativeInt
    before: StateGeometry
    after: StateGeometry
    tensors: list[TensorEdit]

    __pydantic_config__ = _AS_STORED


@dataclass(frozen=True)
class ExpansionPlan:
    """All edits of one expansion. `kind` is "expand", or "reinitialize" where the state keeps its size."""

    kind: Literal["expand", "reinitialize"]
    model_type: str
    init: Initialization
    factor: Count
    rank: Count | None
    seed: NonNegativeInt
    layers: Annotated[list[LayerEdit], Field(min_length=1)]
    version: int = PLAN_VERSION

    __pydantic_config__ = _AS_STORED

    @property
    def fresh_tensors(self) -> set[str]:
        """Full names of the tensors that the plan changes or re-initialises in any part."""
        return {edit.name for layer in self.layers for edit in layer.tensors if edit.is_fresh}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values, as config.json holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExpansionPlan":
        """Read a stored plan.

        Raises:
            UserError: it was written by a newer statex, or a value is missing, unknown or of another type.
        """
        if values.get("version") != PLAN_VERSION:
            raise UserError(
                "expansion.version",
                values.get("version"),
                f"is not version {PLAN_VERSION}, which this statex reads",
                "update statex, or restore config.json",
            )
        try:
            return _stored_form().validate_json(json.dumps(values))
        except ValidationError as error:
            found = user_error(error)
            raise UserError(f"expansion.{found.field}", found.value, found.problem, RESTORE) from None

    def __str__(self) -> str:
        lines = [f"{self.kind} {self.model_type}: init {self.init}, factor {self.factor}, seed {self.seed}"]
        for layer in self.layers:
            before, after = layer.before, layer.after
            lines.append(
                f"  layer {layer.index}: {before.num_heads} x ({before.key_dim} x {before.value_dim}) -> "
                f"{after.num_heads} x ({after.key_dim} x {after.value_dim}), "
                f"{before.elements:,} -> {after.elements:,} state elements"
            )
            width = max(len(edit.name) for edit in layer.tensors)
            for edit in layer.tensors:
                shapes = f"{edit.before or 'new'} -> {edit.after}" if edit.before != edit.after else f"{edit.after}"
                lines.append(f"    {edit.name:<{width}}  {shapes}  {edit.edit}")
        return "\n".join(lines)


@functools.cache
def _stored_form() -> TypeAdapter[ExpansionPlan]:
    return TypeAdapter(ExpansionPlan)


def stored_plan(config: PreTrainedConfig) -> ExpansionPlan | None:
    """The plan in a model's configuration, None where there is none.

    Raises:
        UserError: it is damaged, or cannot be a plan for this model.
    """
    values = getattr(config, "expansion", None)
    if values is None:
        return None
    plan = ExpansionPlan.from_dict(values)
    _check_plan(plan, config)
    return plan


def _check_plan(plan: ExpansionPlan, config: PreTrainedConfig) -> None:
    """Raise UserError unless the plan says what an expansion of this configuration would."""
    family = family_of(config)
    if plan.model_type != family.model_type:
        raise UserError("expansion.model_type", plan.model_type, f"is not {family.model_type}, the model's", RESTORE)
    indices = [layer.index for layer in plan.layers]
    for index in indices:
        if index not in family.recurrent_layers(config) or indices.count(index) > 1:
            problem = "is there twice" if indices.count(index) > 1 else "is no recurrent layer of this model"
            raise UserError("expansion.layers", index, problem, RESTORE)
    before = family.geometry(config)
    if plan.kind == "expand":
        after = family.expanded_geometry(config, plan.factor, plan.init)
    else:
        after = before
        if (plan.init, plan.factor, plan.rank) != ("reinit", 1, None):
            raise UserError("expansion.kind", plan.kind, "does not go with its init, factor and rank", RESTORE)
    if plan.rank is not None and plan.init != "preserve":
        raise UserError("expansion.rank", plan.rank, f"does not go with init {plan.init!r}", RESTORE)
    for layer in plan.layers:
        for name, geometry in (("before", before), ("after", after)):
            if (stored := getattr(layer, name)) != geometry:
                field = f"expansion.layers.{layer.index}.{name}"
                raise UserError(field, asdict(stored), f"is not the model's, {asdict(geometry)}", RESTORE)


def check_plan_tensors(model: Any, plan: ExpansionPlan) -> None:
    """Raise UserError unless the plan lists exactly the tensors of `model`, which has this plan, and their shapes."""
    family = family_of(model.config)
    for layer in plan.layers:
        mixer, norm = (path.format(layer.index) for path in (family.mixer_path, family.norm_path))
        with torch.device("meta"):
            mixer_class = type(model.get_submodule(mixer))
            old = dict(
                family.build_mixer(mixer_class, model.config, layer.index, layer.before, None).named_parameters()
            )
        shapes = {
            f"{mixer}.{name}": (list(old[name].shape) if name in old else None, list(tensor.shape))
            for name, tensor in model.get_submodule(mixer).named_parameters()
        }
        if plan.init in RESETS_PRE_NORM:
            norms = model.get_submodule(norm).named_parameters()
            shapes |= {f"{norm}.{name}": (list(tensor.shape), list(tensor.shape)) for name, tensor in norms}
        stored = {edit.name: (edit.before, edit.after) for edit in layer.tensors}
        if stored != shapes or len(layer.tensors) != len(shapes):
            wrong = next(
                (name for name in [*shapes, *stored] if stored.get(name) != shapes.get(name)), "a tensor twice"
            )
            field = f"expansion.layers.{layer.index}.tensors"
            raise UserError(field, stored.get(wrong), f"does not say what the model has for {wrong}", RESTORE)


def layer_geometry(config: PreTrainedConfig) -> dict[int, StateGeometry]:
    """State of each recurrent layer, as the configuration and its stored plan say."""
    family, plan = family_of(config), stored_plan(config)
    geometry = {index: family.geometry(config) for index in family.recurrent_layers(config)}
    return geometry | {layer.index: layer.after for layer in plan.layers} if plan else geometry


def plan_expansion(model_or_config: nn.Module | PreTrainedConfig, expansion: ExpansionConfig) -> ExpansionPlan:
    """Work out an expansion without touching anything; a configuration suffices, weights are not needed.

    Raises:
        UserError: unknown family, layer out of range, factor that does not fit, or a model that is expanded already.
    """
    model = model_of(model_or_config)
    family = family_of(model.config)
    family.check(model.config)
    refuse_second_plan(model.config)
    layers = select_layers(family.recurrent_layers(model.config), expansion)
    factor = expansion.factor if expansion.factor is not None else family.default_factor(model.config)
    after = family.expanded_geometry(model.config, factor, expansion.init)
    edits = [_plan_layer(model, family, index, after, expansion.init, expansion.rank) for index in layers]
    return ExpansionPlan("expand", family.model_type, expansion.init, factor, expansion.rank, expansion.seed, edits)


def plan_reinitialization(
    model_or_config: nn.Module | PreTrainedConfig, layers: list[int], seed: int = 0
) -> ExpansionPlan:
    """The control's plan: the same mixers made fresh, the state not enlarged.

    Raises:
        UserError: unknown family, layer or seed out of range, or a model that has a plan already.
    """
    model = model_of(model_or_config)
    family = family_of(model.config)
    family.check(model.config)
    refuse_second_plan(model.config)
    geometry = family.geometry(model.config)
    chosen = ExpansionConfig(layers=layers, seed=seed)
    indices = select_layers(family.recurrent_layers(model.config), chosen)
    edits = [_plan_layer(model, family, index, geometry, "reinit", None) for index in indices]
    return ExpansionPlan("reinitialize", family.model_type, "reinit", 1, None, chosen.seed, edits)


def select_layers(recurrent: list[int], expansion: ExpansionConfig) -> list[int]:
    """Indices of the layers that an ExpansionConfig chooses among the recurrent ones.

    Raises:
        UserError: a layer that does not exist or has no matrix state, or more layers than there are.
    """
    known = f"the recurrent layers are {_ranges(recurrent)}"
    if expansion.layers is not None:
        for index in expansion.layers:
            if index not in recurrent:
                raise UserError("layers", index, "is not a recurrent layer of this model", known)
        return sorted(expansion.layers)
    if expansion.num_layers is not None:
        if expansion.num_layers > len(recurrent):
            raise UserError("num_layers", expansion.num_layers, "is more than the model has", known)
        return [recurrent[i * len(recurrent) // expansion.num_layers] for i in range(expansion.num_layers)]
    return recurrent[:: expansion.every or 6]


def refuse_second_plan(config: PreTrainedConfig) -> None:
    """Raise UserError where the model was expanded or re-initialised before."""
    if plan := stored_plan(config):
        done = "expanded" if plan.kind == "expand" else "re-initialised"
        layers = ", ".join(str(layer.index) for layer in plan.layers)
        raise UserError(
            "model", config.name_or_path or config.model_type, f"is {done} already (layers {layers})",
            "start from the checkpoint before that, with the layers and factor you want",
        )  # fmt: skip


def model_of(model_or_config: nn.Module | PreTrainedConfig) -> Any:
    """The model itself, or one on the meta device made from a configuration.

    Raises:
        UserError: a model that cannot be changed in place as it stands.
    """
    if isinstance(model_or_config, nn.Module):
        require_expandable(model_or_config)
        return model_or_config
    family_of(model_or_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_or_config)


def _plan_layer(model: Any, family: Family, index: int, after: StateGeometry, init: str, rank: int | None) -> LayerEdit:
    mixer = model.get_submodule(family.mixer_path.format(index))
    with torch.device("meta"):
        require_mixer(mixer, family.build_mixer(type(mixer), model.config, index, family.geometry(model.config), None))
        expanded = family.build_mixer(type(mixer), model.config, index, after, rank)
    start = INITIALIZERS[init](family, model.config, after, rank)
    old_shapes = {name: list(tensor.shape) for name, tensor in mixer.named_parameters()}
    prefix = family.mixer_path.format(index)
    edits = [
        TensorEdit(f"{prefix}.{name}", old_shapes.get(name), list(tensor.shape), describe(start(name)))
        for name, tensor in expanded.named_parameters()
    ]
    if init in RESETS_PRE_NORM:
        norm = family.norm_path.format(index)
        for name, tensor in model.get_submodule(norm).named_parameters():
            shape = list(tensor.shape)
            edits.append(TensorEdit(f"{norm}.{name}", shape, shape, describe("fresh")))
    return LayerEdit(index, family.geometry(model.config), after, edits)


def describe(start: TensorRows | str) -> str:
    """The edit of one tensor in words: "kept", "fresh", or what becomes of its rows."""
    if isinstance(start, str):
        return {"keep": "kept"}.get(start, start)
    parts = []
    for segment in start.segments:
        if segment.after > segment.before:
            new = segment.num_blocks * (segment.after - segment.before)
            noise = f" with {segment.noise:.0%} noise" if segment.noise else ""
            scale = f", all times {segment.scale:.3g}" if segment.scale != 1.0 else ""
            parts.append(f"{segment.name}: {new} new rows, {segment.fill}{noise}{scale}")
        elif segment.order is not None:
            parts.append(f"{segment.name}: heads in the order {list(segment.order)}")
    return "; ".join(parts)


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    groups: list[list[int]] = []
    for index in indices:
        if groups and index == groups[-1][1] + 1:
            groups[-1][1] = index
        else:
            groups.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in groups)
