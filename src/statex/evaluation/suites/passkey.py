"""Passkey: five digits hidden in repeated filler, by length and depth.

An answer is right if every one of its tokens is the model's first choice, which is the same as greedy decoding giving
exactly these tokens. The answer's NLL is informative where accuracy is near 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.prompts.grids import check_lengths, grid_depths, grid_lengths
from statex.evaluation.prompts.needle_suite import GridSettings
from statex.evaluation.records import Score, digest, item_score
from statex.evaluation.suite import Cell, Suite

if TYPE_CHECKING:
    from statex.data.recall import PasskeyItem


class PasskeySettings(GridSettings):
    """The grid of all needle suites."""


def cells(context: Context) -> list[Cell]:
    settings = context.settings("passkey")
    return [
        Cell(f"length-{length}-depth-{depth}", {"length": length, "depth": depth})
        for length in grid_lengths(context, "passkey", settings.lengths, shortest(context))
        for depth in grid_depths(settings.num_depths)
    ]


def shortest(context: Context) -> int:
    """Tokens that any question fits into."""
    from statex.data.recall import PasskeyBuilder

    return PasskeyBuilder(context.require_tokenizer("passkey")).min_length


def build_items(context: Context, cell: Cell) -> list[PasskeyItem]:
    """The cell's questions, the same for every model with this tokenizer."""
    from statex.data.recall import PasskeyBuilder, random_passkey

    builder = PasskeyBuilder(context.require_tokenizer("passkey"))
    length, depth = cell.slice["length"], cell.slice["depth"]
    generator = np.random.default_rng([context.evaluation.seed, length, round(10_000 * depth)])
    try:
        count = context.settings("passkey").num_items
        return [builder.build(length, depth, random_passkey(generator)) for _ in range(count)]
    except UserError as error:
        raise UserError("evaluation.passkey.lengths", length, error.problem, error.remedy) from error


def score(context: Context, cell: Cell) -> list[Score]:
    import torch

    items, scores = build_items(context, cell), []
    ids = torch.tensor([item.prompt_ids + item.answer_ids for item in items])
    labels = torch.full_like(ids, -100)
    for row, item in zip(labels, items, strict=True):
        row[len(item.prompt_ids) :] = torch.tensor(item.answer_ids)
    nll, right = context.score(ids, labels)
    for number, item in enumerate(items):
        values = {
            "accuracy": float(int(right[number].sum()) == len(item.answer_ids)),
            "answer_nll": float(nll[number].sum()) / len(item.answer_ids),
        }
        asked = digest(item.prompt_ids, item.answer_ids)
        scores.append(item_score(cell, number, values, digest=asked, tokens=item.num_tokens, depth=item.depth))
    return scores


SUITE = Suite(
    name="passkey",
    units={"accuracy": "fraction", "answer_nll": "nats"},
    groups=(("length", "depth"), ("length",)),
    cells=cells,
    score=score,
    settings=PasskeySettings,
    check=lambda context: check_lengths(context, "passkey", build_items, shortest),
)
