"""The folder in which an evaluation keeps its scores: the model and settings it belongs to."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.results.record import SETTINGS_FILES
from statex.utils.atomic import write_text_atomic
from statex.utils.nested import first_difference


def claim_folder(output: Path, settings: dict[str, Any], name: str = SETTINGS_FILES[0]) -> None:
    """Write the settings to the file `name` in `output`, or check that it was made with the same ones.

    Raises:
        UserError: it was made with another model, text or other settings.
    """
    settings = json.loads(json.dumps(settings))
    for claim in SETTINGS_FILES:
        if not (output / claim).exists():
            continue
        before = json.loads((output / claim).read_text(encoding="utf-8"))
        for key in settings if claim == name else ("model",):
            if before.get(key) != settings[key]:
                place, old, new = first_difference(before.get(key), settings[key], key)
                problem = f"was made with another {place} ({old!r}, now {new!r})"
                raise UserError("output", str(output), problem, "choose another folder, or remove this one")
    if not (output / name).exists():
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output / name, json.dumps(settings, indent=2) + "\n")


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the model's class, tensor names and shapes, and a sample of each tensor's values."""
    state = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu().numpy()
        state.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return state.hexdigest()[:16]
