"""Keywords of a forward that nothing reads are refused, where transformers would silently drop them."""

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")
"""What transformers' causal language-model loss takes beside logits and labels; it drops all others."""


def check_keywords(given: Mapping[str, Any], known: Container[str] = LOSS_KEYWORDS) -> None:
    """Refuse keywords of a forward that are not `known`.

    Raises:
        TypeError: as Python does for a function without `**kwargs`.
    """
    for name in given:
        if name not in known:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by their names, `names` those of the positional ones.

    Raises:
        TypeError: as Python does, for too many of them and for one that is given twice.
    """
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} positional arguments but {len(args)} were given")
    given = dict(zip(names, args, strict=False))
    for name in given.keys() & kwargs.keys():
        raise TypeError(f"forward() got multiple values for argument {name!r}")
    return given | dict(kwargs)


def check_no_attentions(output_attentions: bool | None) -> None:
    """Refuse a request for attention weights, which the model does not have; wrappers such as PEFT's pass None.

    Raises:
        ValueError: they are asked for.
    """
    if output_attentions:
        raise ValueError("output_attentions: a recurrent model has no attention weights; leave it out")


def with_arguments_of(original: Callable) -> Callable[[Callable], Callable]:
    """Add the arguments of transformers' forward to our signature, which generate and the Trainer read."""

    def decorate(forward: Callable) -> Callable:
        theirs, ours = (inspect.signature(one) for one in (original, forward))
        *parameters, last = theirs.parameters.values()
        assert last.kind is last.VAR_KEYWORD, "transformers' forward takes further keywords"
        own = [
            parameter
            for name, parameter in ours.parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name not in theirs.parameters
        ]
        forward.__signature__ = theirs.replace(parameters=[*parameters, *own, last])  # type: ignore[attr-defined]
        return forward

    return decorate
