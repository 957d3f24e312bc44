"""Name, shape and dtype of a folder's tensors from the headers of its safetensors files, without any weights."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from statex.checkpoint.folder import read_json
from statex.errors import UserError

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class TensorHeader:
    """One entry of a safetensors header."""

    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: str | os.PathLike) -> dict[str, TensorHeader]:
    """Name, shape and dtype of every tensor of a folder, without reading any weights.

    Raises:
        UserError: there are no safetensors files, or one is truncated or damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        names = _shards(folder / INDEX)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        problem = f"has only pickled weights ({pickled[0]})" if pickled else f"has no {WEIGHTS}"
        raise UserError(
            "model", str(folder), problem, "save the model again with save_pretrained, which writes safetensors"
        )
    headers: dict[str, TensorHeader] = {}
    for name in names:
        headers |= _read_header(folder / name)
    return headers


def _shards(index: Path) -> list[str]:
    """Names of the weight files that an index lists."""
    values = read_json(index)
    if not all(isinstance(values.get(key), dict) for key in ("metadata", "weight_map")):
        problem = "is damaged (no metadata or no weight_map)"
        raise UserError(index.name, str(index), problem, "restore it from the source")
    return sorted(set(values["weight_map"].values()))


def _read_header(path: Path) -> dict[str, TensorHeader]:
    """Names and shapes in a safetensors file, its length checked against what its header promises."""
    remedy = "fetch or save the file again"
    if not path.is_file():
        raise UserError("model", str(path), "is listed in the index but is not there", remedy)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise UserError("model", str(path), f"is truncated: {size} bytes do not hold its header", remedy)
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            headers = {name: TensorHeader(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise UserError("model", str(path), "is no safetensors file: its header is damaged", remedy) from None
    if size != end:
        raise UserError("model", str(path), f"is truncated or damaged: {size} bytes instead of {end}", remedy)
    return headers
