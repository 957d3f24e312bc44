"""`statex run`: stages (`stages`), their checks beforehand (`preflight`), and the whole of a recipe (`chains`).

What is public is imported when it is first used: processes and signals (`launch`) must be at hand at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statex.run.chains import prepare_text, run_chain, run_recipe
    from statex.run.collect import unfinished_stages
    from statex.run.selection import Chain, Selection, chains_of

_HOMES = {
    "Chain": "selection",
    "Selection": "selection",
    "chains_of": "selection",
    "prepare_text": "chains",
    "run_chain": "chains",
    "run_recipe": "chains",
    "unfinished_stages": "collect",
}

__all__ = ["Chain", "Selection", "chains_of", "prepare_text", "run_chain", "run_recipe", "unfinished_stages"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"statex.run.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'statex.run' has no attribute {name!r}")
