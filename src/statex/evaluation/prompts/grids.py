"""Lengths and depths of a grid of needle questions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.suite import Cell

if TYPE_CHECKING:
    from statex.evaluation.reader import Reader

logger = logging.getLogger(__name__)

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
CPU_DEFAULT_LENGTHS = {20e6: (512, 1024, 2048), 200e6: (512, 1024), float("inf"): (512,)}
"""Most parameters of the model before any expansion -> lengths that a CPU reads in minutes."""


def grid_lengths(
    context: Context,
    suite: str,
    asked: list[int] | None,
    shortest: int,
    has_text: Callable[[int], bool] = lambda length: True,
) -> list[int]:
    """The requested lengths, which `check_lengths` has checked; by default those that model and device allow.

    Args:
        shortest: tokens that a question needs; shorter default lengths are left out.
        has_text: whether there is text for prompts of a length; other default lengths are left out too.

    Raises:
        UserError: no default length is allowed.
    """
    if asked is not None:
        return asked
    candidates = default_lengths(context.reader)
    lengths = [length for length in candidates if shortest <= length <= (context.limit or length) and has_text(length)]
    if not lengths:
        raise _no_default(suite, shortest)
    logger.info("%s: lengths %s", suite, lengths)
    return lengths


def check_lengths(
    context: Context, suite: str, build: Callable[[Context, Cell], object], shortest: Callable[[Context], int]
) -> None:
    """Refuse lengths that the model cannot read, that are too short for a question, or too long for the text.

    Args:
        build: makes the items of a cell; one of each requested length is built.
        shortest: tokens that a question needs.

    Raises:
        UserError: a requested length is more than the model can read, no default length is allowed, or what `build`
            raises.
    """
    settings = context.settings(suite).model_copy(update={"num_items": 1})
    single = replace(context, evaluation=context.evaluation.model_copy(update={suite: settings}))
    context.require_tokenizer(suite)
    if settings.lengths is None and context.limit is not None:
        needed = shortest(context)
        if context.limit < max(needed, _shortest_default(context)):
            raise _no_default(suite, needed)
    for length in settings.lengths or []:
        context.check_length(f"evaluation.{suite}.lengths", length)
        build(single, Cell("", {"length": length, "depth": 0.5}))


def _no_default(suite: str, shortest: int) -> UserError:
    problem = f"no default length that model and text allow has room for a question of {shortest} tokens"
    return UserError(f"evaluation.{suite}.lengths", None, problem, "give lengths, or leave the suite out")


def _shortest_default(context: Context) -> int:
    """The shortest default length of any model on the device that measures."""
    from statex.utils.environment import default_device

    device = context.reader.device if context.reader is not None else default_device()
    return min(DEFAULT_LENGTHS if device.type != "cpu" else min(CPU_DEFAULT_LENGTHS.values()))


def default_lengths(reader: Reader) -> tuple[int, ...]:
    """The lengths that the device reads in minutes, the same for a model before and after expansion."""
    from statex.expansion.stored import stored_plan

    if reader.device.type != "cpu":
        return DEFAULT_LENGTHS
    size = sum(parameter.numel() for parameter in reader.model.parameters())
    if plan := stored_plan(reader.config):
        size -= sum(change.growth for layer in plan.layers for change in layer.tensors)
    return next(lengths for most, lengths in CPU_DEFAULT_LENGTHS.items() if size <= most)


def grid_depths(num_depths: int) -> list[float]:
    """(i + 0.5) / n: the middles of n equal parts of the context."""
    return [round((number + 0.5) / num_depths, 4) for number in range(num_depths)]
