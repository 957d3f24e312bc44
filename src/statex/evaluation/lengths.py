"""Lengths and depths of a grid of needle questions."""

import logging

from statex.evaluation.context import Context

logger = logging.getLogger(__name__)

DEFAULT_LENGTHS = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)}


def grid_lengths(context: Context, suite: str, asked: list[int] | None) -> list[int]:
    """The lengths that were asked for, all of which the model must be able to read; else those the device allows."""
    if asked is not None:
        for length in asked:
            context.check_length(f"evaluation.{suite}.lengths", length)
        return asked
    lengths = list(DEFAULT_LENGTHS.get(context.reader.device.type, DEFAULT_LENGTHS["cuda"]))
    if context.limit is not None:
        lengths = [length for length in lengths if length <= context.limit]
    logger.info("%s: lengths %s", suite, lengths)
    return lengths


def grid_depths(num_depths: int) -> list[float]:
    """(i + 0.5) / n: the middles of n equal parts of the context."""
    return [round((number + 0.5) / num_depths, 4) for number in range(num_depths)]
