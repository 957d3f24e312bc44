"""Write a changed model with everything that its source folder holds beside the weights."""

import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from statex.checkpoint.folder import model_folder
from statex.expansion.plan import stored_plan
from statex.expansion.state import state_report
from statex.files import new_folder

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

    Tokenizer, chat template and generation configuration are copied as files, so that nothing in them changes.

    Raises:
        UserError: `out` exists.
    """
    source = model_folder(source)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        for path in sorted(source.iterdir()):
            left_out = ("config.json", "README.md", "trainer_state.json", ".gitattributes")
            if path.is_file() and path.name not in left_out and not path.name.endswith(NO_COMPANIONS):
                shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(_card(model, source), encoding="utf-8")


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
