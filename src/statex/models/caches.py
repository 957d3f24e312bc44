"""How a model takes its cache and where it returns it: decided only here.

transformers calls both `cache` since 5.24. Before, they were `cache_params` for Mamba, Mamba2 and similar models, and
`past_key_values` for all other models; models outside transformers may keep those names.
"""

import inspect
from dataclasses import fields
from typing import Any

from statex.errors import UserError

CACHE_NAMES = ("cache", "cache_params", "past_key_values")


def cache_argument(model: Any) -> str:
    """The name under which the forward of a model takes its cache.

    Raises:
        UserError: it takes none.
    """
    accepted = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in accepted:
            return name
    raise UserError(
        "model",
        type(model).__name__,
        f"its forward takes none of {', '.join(CACHE_NAMES)}",
        "use a causal language model that has a cache",
    )


def cache_field(output_class: Any) -> str:
    """The field of transformers' dataclass of outputs that holds the cache."""
    names = {field.name for field in fields(output_class)}
    return next(name for name in CACHE_NAMES if name in names)


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, None where there is none."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache that was given, under the one name or the other.

    Raises:
        ValueError: it was given under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("past_key_values: a second cache beside the argument `cache`; leave one out")
    return cache if cache is not None else past_key_values
