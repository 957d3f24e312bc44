"""The edits of an expansion, tensor by tensor: made by the planner, stored in config.json, applied by the surgery."""

import functools
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

from statex.errors import UserError
from statex.expansion.config import Initialization, user_error
from statex.families import StateGeometry, TensorRows

PLAN_VERSION = 2
RESTORE = "restore the model's config.json"

Count = Annotated[int, Field(ge=1, lt=2**31)]
Edit = Literal["kept", "re-initialised"] | TensorRows
"""What happens to a tensor: it keeps its weights, is re-initialised, or its rows grow or are reordered."""
_AS_STORED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class TensorEdit:
    """The edit of one tensor: its full name, its shapes before (None: it is new) and after, and what happens to it."""

    name: str
    before: list[Count] | None
    after: list[Count]
    edit: Edit

    __pydantic_config__ = _AS_STORED

    @property
    def is_fresh(self) -> bool:
        """Whether any of the tensor was changed or re-initialised; learning-rate multipliers apply to such tensors."""
        return self.edit != "kept"

    @property
    def words(self) -> str:
        """The edit in words: "kept", "fresh", or what happens to its rows."""
        return _rows_in_words(self.edit) if isinstance(self.edit, TensorRows) else WORDS[self.edit]

    @property
    def fits(self) -> bool:
        """Whether the edit turns a tensor of the shape `before` into one of the shape `after`."""
        if self.edit == "re-initialised":
            return True
        if not isinstance(self.edit, TensorRows):
            return self.before == self.after
        dim, segments = self.edit.dim, self.edit.segments
        before = self.before if self.before is not None else [*self.after[:dim], 0, *self.after[dim + 1 :]]
        if not (dim < len(self.after) == len(before) and all(segment.is_possible for segment in segments)):
            return False
        covered = [sum(each.num_blocks * size for each, size in zip(segments, sizes)) for sizes in _sizes(segments)]
        others = [[*shape[:dim], *shape[dim + 1 :]] for shape in (before, self.after)]
        return covered == [before[dim], self.after[dim]] and others[0] == others[1]


WORDS = {"kept": "kept", "re-initialised": "fresh"}


def _sizes(segments: Any) -> tuple[list[int], list[int]]:
    return [each.before for each in segments], [each.after for each in segments]


def _rows_in_words(rows: TensorRows) -> str:
    new_rows: dict[tuple[str, str], int] = {}  # blocks that lie apart, such as one per head, are counted together
    parts = []
    for segment in rows.segments:
        if segment.after > segment.before:
            noise = f" with {segment.noise:.0%} noise" if segment.noise else ""
            scale = f", all times {segment.scale:.3g}" if segment.scale != 1.0 else ""
            kind = segment.name, f"{segment.fill}{noise}{scale}"
            new_rows[kind] = new_rows.get(kind, 0) + segment.num_blocks * (segment.after - segment.before)
        elif segment.order is not None:
            parts.append(f"{segment.name}: heads in the order {list(segment.order)}")
    return "; ".join([*(f"{name}: {count} new rows, {how}" for (name, how), count in new_rows.items()), *parts])


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
        return _stored_form().dump_python(self, mode="json")

    def in_words(self) -> dict[str, Any]:
        """The same with each edit in words."""
        values = self.to_dict()
        for layer, in_dict in zip(self.layers, values["layers"]):
            for edit, edit_in_dict in zip(layer.tensors, in_dict["tensors"]):
                edit_in_dict["edit"] = edit.words
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], field: str = "expansion") -> "ExpansionPlan":
        """Read a stored plan.

        Args:
            field: where the plan stands, for errors.

        Raises:
            UserError: it is of another version, a value is missing, unknown or of another type, or an edit does not
                match the shapes that it names.
        """
        if values.get("version") != PLAN_VERSION:
            problem, remedy = f"is not version {PLAN_VERSION}, which this statex reads", "update statex, or "
            raise UserError(f"{field}.version", values.get("version"), problem, f"{remedy}restore config.json")
        try:
            plan = _stored_form().validate_json(json.dumps(values))
        except ValidationError as error:
            found = user_error(error)
            raise UserError(f"{field}.{found.field}", found.value, found.problem, RESTORE) from None
        for layer in plan.layers:
            for edit in layer.tensors:
                if not edit.fits:
                    where = f"{field}.layers.{layer.index}.tensors"
                    raise UserError(where, edit.name, "has an edit that does not make its shape", RESTORE)
        return plan

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
                lines.append(f"    {edit.name:<{width}}  {shapes}  {edit.words}")
        return "\n".join(lines)


@functools.cache
def _stored_form() -> TypeAdapter[ExpansionPlan]:
    return TypeAdapter(ExpansionPlan)


@dataclass(frozen=True)
class TensorChange:
    """The combined effect of all edits of one tensor; a shape is None where the tensor does not exist."""

    name: str
    before: list[int] | None
    after: list[int]
    is_fresh: bool

    @property
    def growth(self) -> int:
        """How many more numbers the tensor has than before."""
        return math.prod(self.after) - (math.prod(self.before) if self.before is not None else 0)


@dataclass(frozen=True)
class LayerChange:
    """The combined effect, in order, of the steps that edited one layer."""

    index: int
    steps: list[LayerEdit]

    @property
    def before(self) -> StateGeometry:
        """The state before any of them."""
        return self.steps[0].before

    @property
    def after(self) -> StateGeometry:
        """The state as it is now."""
        return self.steps[-1].after

    @property
    def tensors(self) -> list[TensorChange]:
        """The tensors that any of them names."""
        changes: dict[str, TensorChange] = {}
        for edit in (edit for step in self.steps for edit in step.tensors):
            earlier = changes.get(edit.name)
            before, was_fresh = (earlier.before, earlier.is_fresh) if earlier else (edit.before, False)
            changes[edit.name] = TensorChange(edit.name, before, edit.after, was_fresh or edit.is_fresh)
        return list(changes.values())


@dataclass(frozen=True)
class StoredPlan:
    """The steps from the un-expanded model to this one: expansions and re-initialisations, in order."""

    steps: list[ExpansionPlan]

    @property
    def model_type(self) -> str:
        """The family's."""
        return self.steps[0].model_type

    @property
    def kind(self) -> Literal["expand", "reinitialize"]:
        """ "reinitialize" where no step enlarged the state."""
        return "expand" if any(step.kind == "expand" for step in self.steps) else "reinitialize"

    @property
    def layers(self) -> list[LayerChange]:
        """The changes of each layer that any step edited."""
        edits: dict[int, list[LayerEdit]] = {}
        for layer in (layer for step in self.steps for layer in step.layers):
            edits.setdefault(layer.index, []).append(layer)
        return [LayerChange(index, steps) for index, steps in sorted(edits.items())]

    @property
    def fresh_tensors(self) -> set[str]:
        """Full names of the tensors that any step changed or re-initialised in any part."""
        return set().union(*(step.fresh_tensors for step in self.steps))
