"""S-NIAH-1, -2 and -3 of RULER (arXiv 2404.06654): one needle in noise or text, by length and depth.

1 hides a number of seven digits in repeated noise, 2 a number in text, 3 a UUID in text. The prompt is RULER's, with
the beginning of the answer behind the question, which models need that are not tuned to answer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from statex.evaluation.context import Cell, Context, Suite
from statex.evaluation.prompts.grids import check_lengths, grid_depths, grid_lengths
from statex.evaluation.prompts.haystack import (
    Haystack,
    noise_haystack,
    random_number,
    random_uuid,
    random_word,
    text_haystack,
)
from statex.evaluation.prompts.insertion import Draft, Draw, build_prompts, shortest_length
from statex.evaluation.prompts.needles import Prompt, Question, score_prompts
from statex.evaluation.records import Score
from statex.recipe import NeedleSuite

INTRODUCTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Kind:
    """What is hidden, and in what.

    Args:
        name: "number" or "uuid", as the prompt calls it.
        value: draws one.
        haystack: for contexts of so many tokens.
    """

    name: str
    value: Callable[[np.random.Generator], str]
    haystack: Callable[[Context, int], Haystack]


KINDS = {
    "niah_single_1": Kind("number", random_number, lambda context, _: noise_haystack(context.tokenizer)),
    "niah_single_2": Kind("number", random_number, text_haystack),
    "niah_single_3": Kind("uuid", random_uuid, text_haystack),
}


def introduction(kind: str) -> str:
    return INTRODUCTION.format(kind=kind)


def needle_draw(kind: Kind, depth: float) -> Draw:
    """Draws one needle with its question."""

    def draw(generator: np.random.Generator) -> Draft:
        key, value = random_word(generator), kind.value(generator)

        def build(text: str, met: list[float]) -> Prompt:
            question = Question(QUESTION.format(kind=kind.name, key=key), (value,), measured={"depth": met[0]})
            return Prompt(introduction(kind.name) + text, (question,))

        return Draft([NEEDLE.format(kind=kind.name, key=key, value=value)], [depth], build)

    return draw


def cell_prompts(context: Context, suite: str, cell: Cell) -> list[Prompt]:
    """The cell's questions, the same for every model with this tokenizer and text."""
    settings: NeedleSuite = getattr(context.evaluation, suite)
    kind, length, depth = KINDS[suite], cell.slice["length"], cell.slice["depth"]
    haystack, draw = kind.haystack(context, length), needle_draw(kind, depth)
    return build_prompts(
        context, f"evaluation.{suite}.lengths", haystack, draw, settings.num_items, length, round(10_000 * depth)
    )


def _cells(suite: str, context: Context) -> list[Cell]:
    settings: NeedleSuite = getattr(context.evaluation, suite)
    context.require_tokenizer(suite)
    shortest = shortest_length(context, needle_draw(KINDS[suite], 0.5))

    def has_text(length: int) -> bool:
        return KINDS[suite].haystack(context, length).holds(length)

    return [
        Cell(f"length-{length}-depth-{depth}", {"length": length, "depth": depth})
        for length in grid_lengths(context, suite, settings.lengths, shortest, has_text)
        for depth in grid_depths(settings.num_depths)
    ]


def _score(suite: str, context: Context, cell: Cell) -> list[Score]:
    settings: NeedleSuite = getattr(context.evaluation, suite)
    return score_prompts(context, suite, cell, cell_prompts(context, suite, cell), settings.max_new_tokens)


def _suite(name: str) -> Suite:
    return Suite(
        name=name,
        units={"accuracy": "fraction", "answer_nll": "nats"},
        groups=(("length", "depth"), ("length",)),
        cells=lambda context: _cells(name, context),
        score=lambda context, cell: _score(name, context, cell),
        check=lambda context: check_lengths(context, name, lambda one, cell: cell_prompts(one, name, cell)),
    )


NIAH_SINGLE_1, NIAH_SINGLE_2, NIAH_SINGLE_3 = map(_suite, KINDS)
