"""What a model folder holds, without reading any weights."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from statex.checkpoint.config import describe
from statex.expansion.state import StateReport, state_report
from statex.expansion.stored import stored_plan


@dataclass(frozen=True)
class Inspection:
    """What a model folder holds, read from config.json and safetensors headers alone."""

    folder: str
    model_type: str
    num_parameters: int
    dtypes: list[str]
    state: StateReport
    expansion: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = {name: getattr(self, name) for name in ("folder", "model_type", "num_parameters", "dtypes")}
        return fields | {"state": self.state.to_dict(), "expansion": self.expansion}


def inspect(folder: str | os.PathLike) -> Inspection:
    """What a model folder holds: family, parameters, dtypes and the state of each layer; reads headers, no weights.

    Raises:
        UserError: as `load`, which also looks at the weights themselves.
    """
    found = describe(folder)
    config, headers = found.config, found.headers
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
    )
