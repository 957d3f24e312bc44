"""Prompts of a given number of tokens: needles inserted between the sentences of a haystack."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.prompts.haystack import Haystack
from statex.evaluation.prompts.needles import Prompt, num_tokens

Draw = Callable[[np.random.Generator], "Draft"]


@dataclass(frozen=True)
class Draft:
    """A prompt without its haystack.

    Args:
        needles: sentences to insert, in order.
        depths: where each goes, from 0 (beginning) to 1 (end), ascending.
        build: makes the prompt from the text with its needles and their actual depths.
    """

    needles: list[str]
    depths: list[float]
    build: Callable[[str, list[float]], Prompt]


def shortest_length(context: Context, draw: Draw) -> int:
    """A length in tokens that fits any prompt of `draw`, estimated from ten of them with a margin of a tenth."""
    generator = np.random.default_rng(context.evaluation.seed)
    drafts = [draw(generator) for _ in range(10)]
    needed = [num_tokens(context.tokenizer, draft.build("\n".join(draft.needles), draft.depths)) for draft in drafts]
    return int(1.1 * max(needed))


def build_prompts(
    context: Context, field_name: str, haystack: Haystack, draw: Draw, count: int, length: int, *seed: int
) -> list[Prompt]:
    """`count` prompts of `length` tokens, drawn, with their haystacks, by the evaluation's seed and `seed`."""
    generator = np.random.default_rng([context.evaluation.seed, length, *seed])
    return [insert_needles(context, field_name, haystack, generator, draw(generator), length) for _ in range(count)]


def insert_needles(
    context: Context,
    field_name: str,
    haystack: Haystack,
    generator: np.random.Generator,
    draft: Draft,
    length: int,
) -> Prompt:
    """A prompt that, with its longest question and answer, has at most (and almost) `length` tokens.

    Raises:
        UserError: the length has no room for the needles and the question, or the haystack is too short.
    """
    join = haystack.separator.join
    fixed = num_tokens(context.tokenizer, draft.build(join(draft.needles), draft.depths))
    if fixed > length:
        problem = f"is too short for the needles, the question and the answer, which take {fixed} tokens"
        raise UserError(field_name, length, problem, "ask for longer prompts")
    sentences = haystack.take(generator, length - fixed)
    while True:
        places = [round(depth * len(sentences)) for depth in draft.depths]
        met = [place / len(sentences) if sentences else 0.0 for place in places]
        prompt = draft.build(join(_insert(sentences, places, draft.needles)), met)
        excess = num_tokens(context.tokenizer, prompt) - length
        if excess <= 0 or not sentences:
            return prompt
        sentences = haystack.shorten(sentences, excess)


def _insert(sentences: list[str], places: list[int], needles: list[str]) -> list[str]:
    parts, before = [], 0
    for place, needle in zip(places, needles, strict=True):
        parts += [*sentences[before:place], needle]
        before = place
    return parts + sentences[before:]
