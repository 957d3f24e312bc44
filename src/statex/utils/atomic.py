"""Files and folders written atomically, whenever a process is killed; and one process in a folder at a time."""

import errno
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from statex.errors import UserError

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_WORDS = (
    "No space left on device", "Disk quota exceeded",  # of an OSError without a number, as pyarrow raises it
    "os error 28", "os error 122",  # of safetensors
    "unexpected pos", "PytorchStreamWriter failed", "iostream error",  # of torch, which does not say why
)  # fmt: skip
"""Messages of libraries that cannot write, where the error has no errno."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""The errors with which a file system without locks refuses one."""


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file under another name and rename it, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_new_folder(out: str | os.PathLike, field: str = "OUT") -> None:
    """Refuse a folder that exists or cannot be made; to be called before the work whose result goes there.

    Args:
        out: the folder, which `new_folder` makes later.
        field: what the user calls it.

    Raises:
        UserError: the name is taken or invalid, or its parent is a file or not writable.
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
        for path in missing:  # a name that is too long or has invalid characters is refused by any existing folder
            with suppress(FileNotFoundError):
                (parent / path.name).lstat()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(field, str(out), f"cannot be made ({reason})", remedy) from None
    if not parent.is_dir():
        raise UserError(field, str(out), f"cannot be made ({parent} is not a folder)", remedy)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(field, str(out), f"cannot be made (no permission to write in {parent})", remedy)


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, atomically.

    Its temporary name depends on `out` alone, so that the next call removes what a killed process left.

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
    """The name under which a folder is written until it is complete."""
    return out.with_name(f".{out.name}.tmp")


@contextmanager
def working_in(folder: Path, field: str) -> Iterator[None]:
    """Inside this context, no other process works in `folder`, and an error for lack of space names it.

    Args:
        folder: the folder that is written to, which need not be there yet.
        field: what the user calls it.

    Raises:
        UserError: another process works in it, or it cannot be written to.
    """
    with name_full_disk(folder), locked(folder, field):
        yield


@contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    """Inside this context, what a library raises for lack of space becomes an OSError (ENOSPC) that names a folder.

    The folder is `folder`, or the file's own where the error names a file outside it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        words = " ".join(str(error).split())
        if number not in NO_SPACE and not any(part in words for part in NO_SPACE_WORDS):
            raise
        where, reason = folder, words
        if isinstance(error, OSError) and number in NO_SPACE:
            reason = error.strerror or words
            if error.filename is not None and not Path(error.filename).absolute().is_relative_to(folder.absolute()):
                where = Path(error.filename)  # already a folder where such contexts are nested
                where = where if where.is_dir() else where.parent
        raise OSError(errno.ENOSPC, reason, str(where)) from error


@contextmanager
def locked(folder: Path, field: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, a file next to it, which the system releases however the process ends.

    Args:
        folder: it need not exist.
        field: what the user calls it.
        wait: until the process that holds it ends or releases it.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(field, str(folder), "is not a folder", "use another name")
        path = _lock_path(folder.resolve(), made)
        descriptor = _lock(path, wait)
    except BlockingIOError:
        problem = f"another process works in it ({_holder(path)})"
        raise UserError(field, str(folder), problem, "wait until it ends, or use another folder") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(field, str(folder), f"cannot be written to ({reason})", "use another folder") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # something was written there
            for parent in made:
                parent.rmdir()


def _lock_path(folder: Path, made: list[Path]) -> Path:
    """The file that is the folder's lock; parents that had to be made for it are added to `made`.

    It is next to the folder, which need not exist and must not become half-written; inside it only where its parent is
    not writable, as with a mounted disk.
    """
    parent = folder.parent
    made += [each for each in (parent, *parent.parents) if not each.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    is_inside = folder.is_dir() and not os.access(parent, os.W_OK)
    return (folder if is_inside else parent) / f".{folder.name}.lock"


def _holder(path: Path) -> str:
    """The process that holds a lock, as written in its file."""
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
    return "unknown"


def _lock(path: Path, wait: bool) -> int:
    """The descriptor of a locked file that is really at `path`.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    is_told = False  # of several that wait, each holds the lock in turn: that is one wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its parent was removed in between, by the process that had made it
            continue
        try:
            is_told |= _take(descriptor, path, wait, is_told)
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)  # the process that held it removed it between our opening and our locking


def _take(descriptor: int, path: Path, wait: bool, is_told: bool) -> bool:
    """Lock an open file, and say so once where that means waiting; whether it had to wait.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        if not is_told:
            logger.warning("waiting for %s, which holds %s", _holder(path), path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; start no second process on this folder", path.parent)
    return False
