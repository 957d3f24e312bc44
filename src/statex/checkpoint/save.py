"""Write a changed model with everything that its source folder holds beside the weights."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import CHAT_TEMPLATE_DIR

from statex.checkpoint.config import load_config
from statex.checkpoint.folder import model_folder, read_json
from statex.checkpoint.headers import read_headers
from statex.checkpoint.load import TOKENIZER_FILES, read_tokenizer
from statex.errors import UserError
from statex.expansion.state import state_report
from statex.expansion.stored import stored_plan
from statex.utils.atomic import new_folder

logger = logging.getLogger(__name__)

NEW_OR_LEFT_OUT = ("config.json", "README.md", "trainer_state.json", ".gitattributes")
NO_COMPANIONS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".py",
    ".index.json",
    ".lock",
)
"""Files with these endings are weights, training state, code or locks, and are not copied to an expanded model."""


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the names of safetensors."""


def save_with_companions(model: PreTrainedModel, source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write `model` to the new folder `out` with what its source folder holds beside the weights, and a model card.

    Tokenizer, chat templates and generation configuration are copied as files, so that nothing in them changes but the
    name of the tokenizer's class, where that did not determine it. A link to a file outside the source folder is left
    out, with a warning.

    Raises:
        UserError: `out` exists or cannot be made.
    """
    base, source = base_name(source), model_folder(source)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        for path in _companions(source):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        if any((folder / name).exists() for name in TOKENIZER_FILES):
            _name_tokenizer_class(folder, source)
        write_card(folder, model, base)


def _name_tokenizer_class(folder: Path, source: Path) -> None:
    """Have the copied tokenizer made by the same class as the source's.

    transformers chooses for some model types another than tokenizer_config.json names, and for ours that one.
    """
    try:
        found = type(read_tokenizer(source))
    except UserError as error:
        logger.warning("the tokenizer was copied as it is: %s", error)
        return
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.exists() else {}
    named = values.get("tokenizer_class")
    if named is None or tokenizer_class_from_name(named) is not found:
        values["tokenizer_class"] = found.__name__
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _companions(source: Path) -> Iterator[Path]:
    """The files of a model folder that belong to a changed model too."""
    for path in sorted([*source.iterdir(), *(source / CHAT_TEMPLATE_DIR).glob("*.jinja")]):
        if not path.is_file() or path.name in NEW_OR_LEFT_OUT or path.name.endswith(NO_COMPANIONS):
            continue
        if any(path.resolve().is_relative_to(own) for own in _own_folders(source)):
            yield path
        else:
            logger.warning("%s is a link to a file outside the model's folder and was not copied", path)


def _own_folders(source: Path) -> list[Path]:
    """Where the files of a folder may really be: in it, or where the cache of the hub keeps them."""
    real = source.resolve()
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def write_card(folder: Path, model: PreTrainedModel, base: str | None, training: dict[str, Any] | None = None) -> None:
    """Write the model card, README.md, of a saved model.

    Args:
        folder: where it was saved.
        model: the model; weights are not needed.
        base: name of the checkpoint it was made from (`base_name`), None for a model made from scratch.
        training: settings of its training, None where it was not trained.
    """
    from statex.checkpoint.model_card import model_card

    plan = stored_plan(model.config)
    done = [] if plan is None else ["state expanded" if plan.kind == "expand" else "re-initialised"]
    done += ["trained"] if training else []
    card = model_card(
        name=", ".join([base or f"{model.config.model_type} from scratch", *done]),
        model_type=model.config.model_type,
        base_model=base,
        plans=[step.in_words() for step in plan.steps] if plan else [],
        state=state_report(model).to_dict(),
        num_parameters=model.num_parameters(),
        training=training,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def base_name(source: str | os.PathLike) -> str:
    """The name of a checkpoint: `organisation/name` for one of the hub, even inside the hub's cache, else its folder's
    name, with its parent's where a run gives all its models the same."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    *above, last = folder.absolute().parts
    if above[-1:] == ["snapshots"] and above[-2].startswith("models--"):
        return above[-2].removeprefix("models--").replace("--", "/")
    return above[-1] if last in ("trained", "expanded") else last


def stored_dtype(folder: str | os.PathLike) -> torch.dtype:
    """The dtype in which `load` gives a folder's model: its configuration's, else its first tensor's.

    Raises:
        UserError: as `load`.
    """
    folder = model_folder(folder)
    dtype = load_config(folder).dtype
    if dtype is None:
        first = next(iter(read_headers(folder).values()))
        dtype = DTYPES.get(first.dtype, torch.float32)
    return dtype
