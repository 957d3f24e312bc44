"""The user's mistakes: one shape of message, so that every error says what, which value and what to do."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300
"""Characters of a value, or of a library's words, that a message shows."""
NO_MISTAKES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What the machine lacks, whatever the user asked for."""
BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
"""What a fault of a program raises: where our own code raised it, the fault is ours and not the user's."""


class UserError(ValueError):
    """A mistake of the user, told as field, value and remedy. The command line exits with status 2 on it.

    Args:
        field: the argument, recipe key or file that is wrong.
        value: what was given.
        problem: what is wrong with it, in one clause.
        remedy: what to do instead, in one clause.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str):
        self.field, self.value, self.problem, self.remedy = field, value, problem, remedy
        super().__init__(_printable(f"{field} = {_shown(value)}: {problem}; {remedy}."))

    def __reduce__(self):
        return type(self), (self.field, self.value, self.problem, self.remedy)


@contextmanager
def explained(field: str, value: object, problem: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises at a value or a file of the user's into a UserError that keeps the library's words.

    For the few lines that hand the value to a library, which may raise anything (tokenizers raises a bare Exception,
    Rust a panic that is no Exception, strict configurations their own). These pass as they are: a UserError, also one
    that the library wrapped; what the machine lacks, memory or room on the disk; and a fault of our own code that the
    library called.

    Args:
        field, value, problem, remedy: of the UserError; the library's words follow the problem in parentheses.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interrupt or an exit
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, UserError):
            cause = cause.__cause__  # a strict configuration says only in its cause what is wrong
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in NO_MISTAKES):
            raise
        if isinstance(cause, BUGS) and _is_raised_by_us(cause):
            raise
        raise UserError(field, value, f"{problem} ({_words(cause)})", remedy) from error


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether the innermost Python code that raised an error is this package's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


def _words(error: BaseException) -> str:
    """What an exception says, on one line."""
    words = " ".join(str(error).split()).rstrip(".")
    kind = type(error).__name__
    return _shortened(words if " " in words else f"{kind}: {words}" if words else kind)


def _shown(value: object) -> str:
    try:
        return _shortened(repr(value))
    except (ValueError, RecursionError):  # more digits than Python writes, or nested too deep
        return f"<{type(value).__name__}, too long to show>"


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 50]} ... {text[-45:]}"


def _printable(text: str) -> str:
    """The text on one line; what a terminal would obey or cannot show becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
