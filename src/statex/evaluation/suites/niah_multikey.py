"""Several needles with different keys in one text (RULER, arXiv 2404.06654); every key is asked for.

All questions about a context share its prefill. With K keys the i-th needle is at depth (i + 0.5) / K.
"""

import numpy as np
from pydantic import Field

from statex.evaluation.prompts.grids import grid_depths
from statex.evaluation.prompts.haystack import random_number, random_word, text_haystack
from statex.evaluation.prompts.insertion import Draft, Draw
from statex.evaluation.prompts.needle_suite import LengthSettings, NeedleTask
from statex.evaluation.prompts.needles import Prompt, Question
from statex.evaluation.prompts.single_needle import INTRODUCTION, NEEDLE, QUESTION
from statex.settings import MOST_ITEMS


class MultikeySettings(LengthSettings):
    num_keys: int = Field(default=4, ge=2, le=1000, description="needles in a context; each is asked for")
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="contexts of each length")
    max_new_tokens: int = Field(default=128, ge=1, le=2**16)


def draw_keys(settings: MultikeySettings, _: float) -> Draw:
    """Draws needles with different keys, and a question for each."""
    depths = grid_depths(settings.num_keys)

    def draw(generator: np.random.Generator) -> Draft:
        pairs: dict[str, str] = {}
        while len(pairs) < settings.num_keys:
            pairs[random_word(generator)] = random_number(generator)

        def build(text: str, met: list[float]) -> Prompt:
            questions = tuple(
                Question(QUESTION.format(kind="number", key=key), (value,), {"depth": depth}, {"depth": place})
                for (key, value), depth, place in zip(pairs.items(), depths, met, strict=True)
            )
            return Prompt(INTRODUCTION.format(kind="number") + text, questions)

        needles = [NEEDLE.format(kind="number", key=key, value=value) for key, value in pairs.items()]
        return Draft(needles, depths, build)

    return draw


TASK = NeedleTask("niah_multikey", draw_keys, text_haystack)
SUITE = TASK.suite(MultikeySettings, depth_of_questions=True)
