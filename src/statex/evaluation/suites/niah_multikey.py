"""Several needles with different keys in one text (RULER, arXiv 2404.06654); every key is asked for.

All questions about a context share its prefill. With K keys the i-th needle stands at depth (i + 0.5) / K.
"""

import numpy as np

from statex.evaluation.context import Cell, Context, Suite
from statex.evaluation.prompts.grids import check_lengths, grid_depths, grid_lengths
from statex.evaluation.prompts.haystack import random_number, random_word, text_haystack
from statex.evaluation.prompts.insertion import Draft, Draw, build_prompts, shortest_length
from statex.evaluation.prompts.needles import Prompt, Question, score_prompts
from statex.evaluation.prompts.single_needle import NEEDLE, QUESTION, introduction
from statex.evaluation.records import Score


def draw_keys(num_keys: int) -> Draw:
    """Draws needles with different keys, and a question for each."""
    depths = grid_depths(num_keys)

    def draw(generator: np.random.Generator) -> Draft:
        pairs: dict[str, str] = {}
        while len(pairs) < num_keys:
            pairs[random_word(generator)] = random_number(generator)

        def build(text: str, met: list[float]) -> Prompt:
            questions = tuple(
                Question(QUESTION.format(kind="number", key=key), (value,), {"depth": depth}, {"depth": place})
                for (key, value), depth, place in zip(pairs.items(), depths, met, strict=True)
            )
            return Prompt(introduction("number") + text, questions)

        needles = [NEEDLE.format(kind="number", key=key, value=value) for key, value in pairs.items()]
        return Draft(needles, depths, build)

    return draw


def cells(context: Context) -> list[Cell]:
    settings = context.evaluation.niah_multikey
    context.require_tokenizer("niah_multikey")
    shortest = shortest_length(context, draw_keys(settings.num_keys))

    def has_text(length: int) -> bool:
        return text_haystack(context, length).holds(length)

    lengths = grid_lengths(context, "niah_multikey", settings.lengths, shortest, has_text)
    return [Cell(f"length-{length}", {"length": length}) for length in lengths]


def cell_prompts(context: Context, cell: Cell) -> list[Prompt]:
    """The cell's contexts, each with a question for every key."""
    settings, length = context.evaluation.niah_multikey, cell.slice["length"]
    haystack, draw = text_haystack(context, length), draw_keys(settings.num_keys)
    return build_prompts(context, "evaluation.niah_multikey.lengths", haystack, draw, settings.num_items, length)


def score(context: Context, cell: Cell) -> list[Score]:
    prompts, settings = cell_prompts(context, cell), context.evaluation.niah_multikey
    return score_prompts(context, "niah_multikey", cell, prompts, settings.max_new_tokens)


SUITE = Suite(
    name="niah_multikey",
    units={"accuracy": "fraction", "answer_nll": "nats"},
    groups=(("length", "depth"), ("length",)),
    cells=cells,
    score=score,
    check=lambda context: check_lengths(context, "niah_multikey", cell_prompts),
)
