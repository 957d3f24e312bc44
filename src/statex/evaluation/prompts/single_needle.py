"""S-NIAH of RULER (arXiv 2404.06654): one needle in noise or text, by length and depth.

The prompt is RULER's, with the beginning of the answer after the question, which models without instruction tuning
need.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field

from statex.evaluation.context import Context
from statex.evaluation.prompts.haystack import Haystack, random_word
from statex.evaluation.prompts.insertion import Draft, Draw
from statex.evaluation.prompts.needle_suite import GridSettings, NeedleTask
from statex.evaluation.prompts.needles import Prompt, Question

INTRODUCTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
QUESTION = (
    "\nWhat is the special magic {kind} for {key} mentioned in the provided text?"
    " The special magic {kind} for {key} mentioned in the provided text is"
)


class SingleNeedleSettings(GridSettings):
    """As in RULER, the answer must occur among the tokens that the model generates."""

    max_new_tokens: int = Field(
        default=128,
        ge=1,
        le=2**16,
        description="tokens that an answer is looked for in; fewer where the model's attention ends before",
    )


def single_needle(
    name: str, kind: str, value: Callable[[np.random.Generator], str], haystack: Callable[[Context, int], Haystack]
) -> NeedleTask:
    """A task with one needle.

    Args:
        name: the suite's.
        kind: "number" or "uuid", the prompt's word for the value.
        value: draws a value.
    """

    def draw_at(settings: SingleNeedleSettings, depth: float) -> Draw:
        def draw(generator: np.random.Generator) -> Draft:
            key, drawn = random_word(generator), value(generator)

            def build(text: str, met: list[float]) -> Prompt:
                question = Question(QUESTION.format(kind=kind, key=key), (drawn,), measured={"depth": met[0]})
                return Prompt(INTRODUCTION.format(kind=kind) + text, (question,))

            return Draft([NEEDLE.format(kind=kind, key=key, value=drawn)], [depth], build)

        return draw

    return NeedleTask(name, draw_at, haystack, by_depth=True)
