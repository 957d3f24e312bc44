"""Find a model folder, here or on the hub, and read its JSON files."""

import json
import math
import os
from pathlib import Path
from typing import Any

from statex.errors import UserError, explained
from statex.utils.hub import limit_waiting
from statex.utils.nested import is_unicode, single_values

MOST_BYTES = 2**26
"""Largest JSON file that is read here: an index of a million tensors is smaller."""
ADAPTER = "adapter_config.json"
MAY_BE_INFINITE = "time_step_limit"


def model_folder(folder: str | os.PathLike) -> Path:
    """The folder itself, or the local copy of the hub's model of that name.

    Raises:
        UserError: there is no such folder or model, it has no config.json, or it holds an adapter.
    """
    name = os.fspath(folder)
    if os.path.isdir(name):
        _require_model(Path(name), name)
        return Path(folder)
    if os.path.isfile(name):
        raise UserError("model", name, "is a file", "give a folder that save_pretrained wrote, with safetensors")
    from huggingface_hub import snapshot_download

    remedy = "give the path of a model folder, or a hub name while the hub can be reached"
    with explained("model", name, "is not a folder here and could not be fetched from the hub", remedy):
        limit_waiting()
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        fetched = Path(snapshot_download(name, allow_patterns=patterns))
    _require_model(fetched, name)
    return fetched


def _require_model(folder: Path, name: str) -> None:
    """Raise UserError where a folder holds no model, or an adapter, for which transformers would load another model."""
    if (folder / ADAPTER).exists():
        raise UserError("model", name, f"holds an adapter ({ADAPTER})", "merge it (PEFT's merge_and_unload)")
    if not (folder / "config.json").is_file():
        other = sorted(path.name for path in folder.glob("*.gguf"))
        holds = f", but {other[0]}, which is in another format" if other else ""
        raise UserError("model", name, f"has no config.json{holds}", "give a folder that save_pretrained wrote")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is too large, not UTF-8, not JSON, nested too deeply to be read, or not an object.
    """
    remedy = "restore it from the source"
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UserError(path.name, str(path), f"is damaged ({size:,} bytes)", remedy)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(path.name, str(path), f"is damaged ({error})", remedy) from None
    if not isinstance(values, dict):
        raise UserError(path.name, str(path), "is damaged (not a JSON object)", remedy)
    return values


def check_plain(values: dict[str, Any]) -> None:
    """Refuse values that no field of a config.json can have, at any depth.

    Raises:
        UserError: a number that is not finite or has more than 64 bits, text that is not Unicode, or objects and
            lists nested too deeply.
    """
    for keys, value in single_values(values, "restore the file"):
        if problem := _not_plain(value, keys):
            raise UserError(".".join(keys), value, problem, "correct the value")


def _not_plain(value: Any, keys: tuple[str, ...]) -> str | None:
    """What is wrong with a number or a text, if anything."""
    if isinstance(value, float) and not math.isfinite(value) and keys[0] != MAY_BE_INFINITE:
        return "is not finite"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "has more than 64 bits"
    if isinstance(value, str) and not is_unicode(value):
        return "is not Unicode text"
    return None
