"""Which checkpoint training resumes from: the newest whose files are all as they were written."""

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from statex.errors import UserError
from statex.utils.atomic import write_text_atomic

logger = logging.getLogger(__name__)

LISTING = "files.json"
"""In each checkpoint: its files, each with its size in bytes and its SHA-256."""


def write_listing(checkpoint: Path) -> None:
    """Write what the files of a finished checkpoint are, so that damage shows when training resumes from it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        entries = pool.map(lambda path: {"size": path.stat().st_size, "sha256": _sha256(path)}, files)
    names = [path.relative_to(checkpoint).as_posix() for path in files]
    write_text_atomic(checkpoint / LISTING, json.dumps(dict(zip(names, entries)), indent=2) + "\n")


def last_checkpoint(folder: Path) -> str | None:
    """The latest intact checkpoint in `folder`, None where there is no checkpoint at all.

    A warning names what is passed over. transformers itself would resume with a fresh optimizer, say.

    Raises:
        UserError: all are damaged.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)] if folder.is_dir() else []
    damaged: list[tuple[Path, str]] = []
    for checkpoint in sorted(found, key=lambda path: step_of(path.name), reverse=True):
        damage = damage_of(checkpoint)
        if damage is None:
            for path, reason in damaged:
                logger.warning("%s is damaged (%s); training resumes from %s", path, reason, checkpoint.name)
            return str(checkpoint)
        damaged.append((checkpoint, damage))
    if damaged:
        path, reason = damaged[0]
        remedy = f"restore it, or remove {folder} to train this stage from its beginning"
        raise UserError("checkpoint", str(path), f"{reason}, and no other one is intact", remedy)
    return None


def step_of(checkpoint: str) -> int:
    """The optimizer steps that were done when a checkpoint was written."""
    return int(checkpoint.rpartition("-")[2])


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with the first file of a checkpoint that is not as it was written, None where all are."""
    listing = checkpoint / LISTING
    if not listing.is_file():
        return f"its file {LISTING} is missing"
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))
        expected = {checkpoint / name: _size_and_hash(entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its file {LISTING} cannot be read"
    for path, (size, _) in expected.items():
        name = path.relative_to(checkpoint)
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} is {'cut off' if path.stat().st_size < size else 'not what was written'}"
    with ThreadPoolExecutor() as pool:
        changed = pool.map(lambda path, entry: entry[1] not in (None, _sha256(path)), expected, expected.values())
        for path, is_changed in zip(expected, changed):
            if is_changed:
                return f"its file {path.relative_to(checkpoint)} is not what was written"
    return None


def _size_and_hash(entry: Any) -> tuple[int, str | None]:
    """An entry of a listing; earlier versions wrote sizes alone."""
    return (entry, None) if isinstance(entry, int) else (int(entry["size"]), entry["sha256"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
