"""What lm-eval must not do while its tasks run: reach for the network, or print to standard output."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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

        changes.append((nltk, "download", _no_download))
    except ImportError:
        pass
    before = [getattr(module, name) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)


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


def _no_download(*args: Any, **kwargs: Any) -> bool:
    """What nltk.download returns without a network."""
    return False
