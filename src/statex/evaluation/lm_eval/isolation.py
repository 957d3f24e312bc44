"""What lm-eval must not do while its tasks run: reach for the network, print to standard output, probe the machine."""

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
    """Inside this context, lm-eval logs only errors, and what tasks print goes to standard error, not into --json.

    Nor does it describe the machine after each task, which nobody reads: the programs that it asks take a second.
    """
    import lm_eval.evaluator

    theirs = logging.getLogger("lm_eval")
    before, describe = theirs.level, lm_eval.evaluator.add_env_info
    theirs.setLevel(logging.ERROR)
    lm_eval.evaluator.add_env_info = lambda results: None
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        theirs.setLevel(before)
        lm_eval.evaluator.add_env_info = describe
