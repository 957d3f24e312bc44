"""How big a model's recurrent state is, layer by layer, before and after an expansion."""

from dataclasses import asdict, dataclass
from typing import Any

from statex.expansion.edits import ExpansionPlan
from statex.expansion.stored import layer_geometry, stored_plan
from statex.families import family_of

STATE_BYTES_PER_ELEMENT = 4
"""States are kept in fp32, whatever the dtype of the weights."""


@dataclass(frozen=True)
class LayerState:
    """The state of one recurrent layer; `elements_before` is what it was before the expansion."""

    index: int
    num_heads: int
    key_dim: int
    value_dim: int
    elements: int
    elements_before: int


@dataclass(frozen=True)
class StateStep:
    """One expansion or re-initialisation: its layers, and their state elements before and after it."""

    kind: str
    init: str
    factor: int
    layers: list[int]
    elements_before: int
    elements: int

    def __str__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return (
            f"{self.kind}, init {self.init}, factor {self.factor}, layers {layers}: "
            f"{self.elements_before:,} -> {self.elements:,} elements"
        )


@dataclass(frozen=True)
class StateReport:
    """The recurrent state of a model at batch 1: matrix states only, without the convolutions' inputs."""

    model_type: str
    layers: list[LayerState]
    steps: list[StateStep]

    @property
    def total_elements(self) -> int:
        """Numbers in all layers' states, as the model is now."""
        return sum(layer.elements for layer in self.layers)

    @property
    def total_elements_before(self) -> int:
        """The same before the expansion."""
        return sum(layer.elements_before for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Bytes of all layers' states in fp32."""
        return STATE_BYTES_PER_ELEMENT * self.total_elements

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, totals included."""
        totals = {name: getattr(self, name) for name in ("total_elements", "total_elements_before", "total_bytes")}
        return asdict(self) | totals

    def __str__(self) -> str:
        header = ("layer", "heads", "d_k", "d_v", "elements", "bytes", "before")
        rows = [
            (
                str(layer.index),
                str(layer.num_heads),
                str(layer.key_dim),
                str(layer.value_dim),
                f"{layer.elements:,}",
                f"{STATE_BYTES_PER_ELEMENT * layer.elements:,}",
                f"{layer.elements_before:,}" if layer.elements != layer.elements_before else "",
            )
            for layer in self.layers
        ]
        before = f"{self.total_elements_before:,}" if self.total_elements != self.total_elements_before else ""
        rows.append(("total", "", "", "", f"{self.total_elements:,}", f"{self.total_bytes:,}", before))
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]
        ]
        if before:
            growth = self.total_elements / self.total_elements_before - 1
            num_expanded = sum(layer.elements != layer.elements_before for layer in self.layers)
            lines.append(f"state {growth:+.0%}, expanded layers: {num_expanded}")
        if len(self.steps) > 1:
            lines += [f"step {number}: {step}" for number, step in enumerate(self.steps, 1)]
        return "\n".join(lines)


def state_report(model_or_config: Any) -> StateReport:
    """The recurrent state of a model, layer by layer; works on the meta device and on a bare configuration.

    Raises:
        UserError: the model's family is unknown.
    """
    config = getattr(model_or_config, "config", model_or_config)
    family, plan, geometry = family_of(config), stored_plan(config), layer_geometry(config)
    before = {index: family.geometry(config) for index in geometry}
    if plan is not None:
        before |= {layer.index: layer.before for layer in plan.layers}
    layers = [
        LayerState(
            index, state.num_heads, state.key_dim, state.value_dim, state.elements, before[index].elements
        )
        for index, state in sorted(geometry.items())
    ]  # fmt: skip
    return StateReport(family.model_type, layers, [_step(step) for step in plan.steps] if plan else [])


def _step(plan: ExpansionPlan) -> StateStep:
    before, after = (sum(getattr(layer, name).elements for layer in plan.layers) for name in ("before", "after"))
    indices = [layer.index for layer in plan.layers]
    return StateStep(plan.kind, plan.init, plan.factor, indices, before, after)
