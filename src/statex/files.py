"""Files and folders that are whole or not there, whenever a process is killed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from statex.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, so that `out` is whole or not there.

    It has one name for each `out`, so that what a process left that was killed in the middle goes with the next one.

    Raises:
        UserError: `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise UserError("OUT", str(out), "exists already", "choose another folder or remove this one")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
