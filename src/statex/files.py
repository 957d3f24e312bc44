"""Files and folders that are whole or not there, whenever a process is killed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from statex.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_new_folder(out: str | os.PathLike, field: str = "OUT") -> None:
    """Refuse a folder that exists or that cannot be made; for a call before the work whose result goes there.

    Args:
        out: the folder, which `new_folder` makes later.
        field: what the user calls it.

    Raises:
        UserError: something has that name, or the name is none, or its parent is a file or not to be written to.
    """
    remedy = "choose another folder"
    out = Path(out)
    try:
        if os.path.lexists(out):
            raise UserError(field, str(out), "exists already", f"{remedy} or remove this one")
        missing = [_temporary(out)]
        while not os.path.lexists(missing[-1].parent):
            missing.append(missing[-1].parent)
        parent = missing[-1].parent
        for path in missing:  # a name that is too long, or holds what no name can, is refused where there is a folder
            with suppress(FileNotFoundError):
                (parent / path.name).lstat()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(field, str(out), f"cannot be made ({reason})", remedy) from None
    if not parent.is_dir():
        raise UserError(field, str(out), f"cannot be made ({parent} is no folder)", remedy)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(field, str(out), f"cannot be made (no permission to write in {parent})", remedy)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, so that `out` is whole or not there.

    It has one name for each `out`, so that what a process left that was killed in the middle goes with the next one.

    Raises:
        UserError: `out` exists or cannot be made.
    """
    out = Path(out)
    check_new_folder(out)
    temporary = _temporary(out)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _temporary(out: Path) -> Path:
    """The name under which a folder is written until it is whole."""
    return out.with_name(f".{out.name}.tmp")
