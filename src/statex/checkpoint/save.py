"""Write a changed model with everything that its source folder holds beside the weights."""

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from statex.checkpoint.folder import model_folder
from statex.expansion.plan import stored_plan
from statex.expansion.state import state_report
from statex.files import new_folder

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
)
"""Endings of files that are weights, training state or code: not copied beside an expanded model."""


def save_with_companions(model: PreTrainedModel, source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write `model` to the new folder `out` with what its source folder holds beside the weights, and a model card.

    Tokenizer, chat templates and generation configuration are copied as files, so that nothing in them changes. A link
    to a file outside the source folder is left out, with a warning.

    Raises:
        UserError: `out` exists or cannot be made.
    """
    source = model_folder(source)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        for path in _companions(source):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        (folder / "README.md").write_text(_card(model, source), encoding="utf-8")


def _companions(source: Path) -> Iterator[Path]:
    """The files of a model folder that belong to a changed model too."""
    for path in sorted([*source.iterdir(), *(source / CHAT_TEMPLATE_DIR).glob("*.jinja")]):
        if not path.is_file() or path.name in NEW_OR_LEFT_OUT or path.name.endswith(NO_COMPANIONS):
            continue
        if any(path.resolve().is_relative_to(own) for own in _own_folders(source)):
            yield path
        else:
            logger.warning("%s is a link to a file outside the model's folder and is not copied", path)


def _own_folders(source: Path) -> list[Path]:
    """Where the files of a folder may really be: in it, or where the cache of the hub keeps them."""
    real = source.resolve()
    return [real, real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [real]


def _card(model: PreTrainedModel, source: Path) -> str:
    from statex.reporting.model_card import model_card

    plan = stored_plan(model.config)
    base = source.resolve()
    base_name = base.parent.name if base.name in ("trained", "expanded") else base.name
    return model_card(
        name=f"{base_name}, {'state expanded' if plan and plan.kind == 'expand' else 're-initialised'}",
        model_type=model.config.model_type,
        base_model=base_name,
        plan=plan.to_dict() if plan else None,
        state=state_report(model).to_dict(),
        num_parameters=model.num_parameters(),
    )
