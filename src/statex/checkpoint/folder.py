"""Find a model folder, here or on the hub, and read its JSON files."""

import json
import os
from pathlib import Path
from typing import Any

from statex.errors import UserError


def model_folder(folder: str | os.PathLike) -> Path:
    """The folder itself, or the local copy of what the hub has under that name.

    Raises:
        UserError: there is none, or it has no config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            raise UserError("model", str(folder), "has no config.json", "give a folder that save_pretrained wrote")
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            return Path(snapshot_download(str(folder), allow_patterns=patterns))
        except Exception as error:
            raise UserError(
                "model", str(folder), f"is no folder here, and the hub gave none ({type(error).__name__})",
                "give the path of a model folder, or a hub name while the hub can be reached",
            ) from None  # fmt: skip
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: no UTF-8, no JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UTF-8 or JSON
        raise UserError(path.name, str(path), f"is damaged ({error})", "restore it from the source") from None
    if not isinstance(values, dict):
        raise UserError(path.name, str(path), "is damaged (no JSON object)", "restore it from the source")
    return values
