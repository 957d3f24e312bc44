"""What a model folder holds, without reading any weights."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from statex.checkpoint.config import load_config
from statex.checkpoint.folder import model_folder
from statex.checkpoint.headers import read_headers
from statex.checkpoint.load import check_tensors
from statex.expansion.plan import stored_plan
from statex.expansion.state import StateReport, state_report


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
        UserError: as `load`.
    """
    folder = model_folder(folder)
    config, headers = load_config(folder), read_headers(folder)
    check_tensors(config, headers, folder)
    plan = stored_plan(config)
    num_parameters = sum(torch.Size(header.shape).numel() for header in headers.values())
    return Inspection(
        folder=str(folder),
        model_type=config.model_type,
        num_parameters=num_parameters,
        dtypes=sorted({header.dtype for header in headers.values()}),
        state=state_report(config),
        expansion=f"{plan.kind}, init {plan.init}, factor {plan.factor}" if plan else None,
    )
