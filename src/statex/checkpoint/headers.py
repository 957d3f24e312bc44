"""Name, shape and dtype of a folder's tensors from the headers of its safetensors files, without any weights."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from statex.checkpoint.folder import read_json
from statex.errors import UserError, explained

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FLOATING = ("F16", "BF16", "F32", "F64")
"""Types of the tensors that a model computes with; a quantised one needs more than a cast."""


@dataclass(frozen=True)
class TensorHeader:
    """One entry of a safetensors header."""

    shape: tuple[int, ...]
    dtype: str
    stored_as: str
    """Its name in the file."""


def read_headers(folder: str | os.PathLike) -> dict[str, TensorHeader]:
    """Name, shape and dtype of every tensor of a folder, without reading any weights.

    Raises:
        UserError: there are no safetensors files, one is truncated or damaged, the index names a file by more than a
            plain name or one that lacks what the index says, or a tensor is not stored in a floating type.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).exists():  # before an index, as transformers does
        return _read_header(folder / WEIGHTS)
    if not (folder / INDEX).exists():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        problem = f"has only pickled weights ({pickled[0]})" if pickled else f"has no {WEIGHTS}"
        raise UserError(
            "model", str(folder), problem, "save the model again with save_pretrained, which writes safetensors"
        )
    files = _weight_map(folder / INDEX)
    headers: dict[str, TensorHeader] = {}
    for file in sorted(set(files.values())):
        found = _read_header(folder / file)
        lacking = [name for name, place in files.items() if place == file and name not in found]
        twice = [name for name in found if name in headers]
        if lacking or twice:
            problem = f"has no {lacking[0]}, which the index lists" if lacking else f"has {twice[0]} a second time"
            raise UserError("model", str(folder / file), problem, "fetch or save the model again")
        headers |= found
    return headers


def stored_alike(folder: str | os.PathLike, first: str, second: str) -> bool:
    """Whether two tensors of a folder are stored with the same bytes; reads those two tensors alone."""
    folder = Path(folder)
    places = {} if (folder / WEIGHTS).exists() else _weight_map(folder / INDEX)
    found = []
    for name in (first, second):
        with safe_open(folder / places.get(name, WEIGHTS), framework="pt") as file:
            found.append(file.get_tensor(name))
    return found[0].dtype == found[1].dtype and torch.equal(*(tensor.view(torch.uint8) for tensor in found))


def _weight_map(index: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor, by its index."""
    values = read_json(index)
    remedy = "restore it from the source"
    if not all(isinstance(values.get(key), dict) for key in ("metadata", "weight_map")):
        raise UserError(index.name, str(index), "is damaged (no metadata or no weight_map)", remedy)
    for name, file in values["weight_map"].items():
        plain = isinstance(file, str) and Path(file).name == file and file.endswith(".safetensors")
        if not plain or "\\" in file or "\0" in file:
            problem = f"the file of {name} is not the plain name of a safetensors file beside the index"
            raise UserError(index.name, file, problem, remedy)
    return values["weight_map"]


def _read_header(path: Path) -> dict[str, TensorHeader]:
    """Names, shapes and dtypes in a safetensors file.

    safetensors itself checks, as when weights are loaded, that types are known, that shapes and offsets agree, and
    that the tensors cover the file without gap or overlap.
    """
    remedy = "fetch or save the file again"
    with explained("model", str(path), "is truncated or damaged", remedy):
        if not path.is_file():
            raise UserError("model", str(path), "is listed in the index but is not there", remedy)
        with safe_open(path, framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {
                name: TensorHeader(tuple(each.get_shape()), each.get_dtype(), name) for name, each in entries.items()
            }
    for name, header in headers.items():
        if header.dtype not in FLOATING:
            problem = f"the tensor {name} is stored as {header.dtype}, not as one of {', '.join(FLOATING)}"
            raise UserError("model", str(path), problem, "save the model again in a floating type, not quantised")
    return headers
