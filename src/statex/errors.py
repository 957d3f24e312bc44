"""The user's mistakes: one shape of message, so that every error says what, which value and what to do."""

import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300
"""Characters of a value, or of a library's message, that an error shows at most."""
NO_MISTAKES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""The machine has run out of something, whatever the user asked for."""
BUGS = (AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Programming errors: raised by our own code, they are our fault, not the user's."""


class UserError(ValueError):
    """A mistake of the user, reported as field, value and remedy. The command line exits with status 2 on it.

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
    """Turn what a library raises for a user's value or file into a UserError that quotes the library's message.

    For the few lines that hand the value to a library, which may raise anything (tokenizers raises a bare Exception,
    Rust a panic that is not an Exception, strict configurations their own). Passed through unchanged are a UserError,
    even one that the library wrapped; a lack of memory or disk space; and an error in our own code that the library
    called.

    Args:
        field, value, problem, remedy: of the UserError; the library's message follows the problem in parentheses.
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
    """The message of an exception, on one line."""
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
    """The text on one line, with control and unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
