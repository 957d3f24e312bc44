"""What lm-eval must not do while its tasks run: reach for the network, or print to standard output."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any


@contextmanager
def offline() -> Iterator[None]:
    """Inside this context, data comes from the disk only, and missing data fails at once."""
    import datasets.config
    import huggingface_hub.constants

    changes: list[tuple[Any, str, Any]] = [
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ]
    try:
        import nltk

        changes.append((nltk, "download", lambda *args, **kwargs: False))  # as without a network
    except ImportError:
        pass
    with ExitStack() as undo:
        for module, name, value in changes:
            undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Inside this context, lm-eval logs only errors, and what tasks print goes to standard error, not into --json."""
    theirs = logging.getLogger("lm_eval")
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        theirs.setLevel(before)
