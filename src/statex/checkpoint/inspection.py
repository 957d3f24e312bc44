"""What a model folder holds, without reading any weights."""

import os
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from statex.checkpoint.config import describe
from statex.errors import UserError
from statex.expansion.config import ExpansionConfig, Initialization, Method
from statex.expansion.plan import model_of, plan_expansion
from statex.expansion.state import StateReport, state_report
from statex.expansion.stored import stored_plan
from statex.families import Family, StateGeometry, family_of


@dataclass(frozen=True)
class Possibility:
    """What expanding every 6th recurrent layer by the default factor would do, or why it is impossible."""

    init: Initialization
    problem: str | None
    method: Method | None = None
    """How the state is enlarged, where there are several ways with this initialisation."""
    factor: int | None = None
    layers: list[int] | None = None
    before: StateGeometry | None = None
    after: StateGeometry | None = None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"no: {self.problem}"
        shapes = (f"{one.num_heads} x ({one.key_dim} x {one.value_dim})" for one in (self.before, self.after))
        method = f"method {self.method}, " if self.method else ""
        return f"{method}factor {self.factor}, layer {self.layers[0] if self.layers else ''}: {' -> '.join(shapes)}"


@dataclass(frozen=True)
class Inspection:
    """What a model folder holds, read from config.json and safetensors headers alone."""

    folder: str
    model_type: str
    num_parameters: int
    dtypes: list[str]
    state: StateReport
    expansion: str | None
    possible: list[Possibility]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = {name: getattr(self, name) for name in ("folder", "model_type", "num_parameters", "dtypes")}
        possible = [asdict(each) for each in self.possible]
        return fields | {"state": self.state.to_dict(), "expansion": self.expansion, "possible": possible}


def inspect(folder: str | os.PathLike) -> Inspection:
    """What a model folder holds: family, parameters, dtypes and the state of each layer; reads headers, no weights.

    Raises:
        UserError: as `load`, which also looks at the weights themselves.
    """
    found = describe(folder)
    config, headers = found.config, found.headers
    network = model_of(config)
    plan = stored_plan(config)
    num_parameters = sum(torch.Size(header.shape).numel() for header in headers.values())
    return Inspection(
        folder=str(found.folder),
        model_type=config.model_type,
        num_parameters=num_parameters,
        dtypes=sorted({header.dtype for header in headers.values()}),
        state=state_report(config),
        expansion=", then ".join(f"{one.kind}, init {one.init}, factor {one.factor}" for one in plan.steps)
        if plan
        else None,
        possible=[
            _possibility(network, init, method)
            for init in get_args(Initialization)
            for method in _methods(family_of(config), init)
        ],
    )


def _methods(family: Family, init: str) -> tuple[Any, ...]:
    """How a family's layers can be enlarged with an initialisation; None for the only way."""
    methods = family.methods.get(init, ())
    return methods if len(methods) > 1 else (None,)


def _possibility(network: Any, init: Initialization, method: Method | None) -> Possibility:
    try:
        plan = plan_expansion(network, ExpansionConfig(init=init, method=method))
    except UserError as error:
        return Possibility(init, str(error), method)
    layers, first = [layer.index for layer in plan.layers], plan.layers[0]
    return Possibility(init, None, method, plan.factor, layers, first.before, first.after)
