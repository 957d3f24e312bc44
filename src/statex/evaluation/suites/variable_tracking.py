"""Variable tracking (RULER, arXiv 2404.06654): chains of assignments in noise; name all variables that have a value.

A short worked example precedes the context, as in RULER. A question's accuracy is the share of its chain's
variables that the model names.
"""

import itertools

import numpy as np
from pydantic import Field

from statex.evaluation.prompts.haystack import NOISE, noise_haystack
from statex.evaluation.prompts.insertion import Draft, Draw
from statex.evaluation.prompts.needle_suite import LengthSettings, NeedleTask
from statex.evaluation.prompts.needles import Prompt, Question
from statex.settings import MOST_ITEMS

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


class VariableTrackingSettings(LengthSettings):
    num_chains: int = Field(default=1, ge=1, le=1000, description="chains in a context; each is asked for")
    num_hops: int = Field(default=4, ge=1, le=1000, description="assignments in a chain after the first")
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="contexts of each length")
    max_new_tokens: int = Field(default=30, ge=1, le=2**16)


def chain(generator: np.random.Generator, num_hops: int, taken: set[str]) -> tuple[str, list[str]]:
    """(value, variables) of a new chain, its variables of five letters not among those `taken`."""
    variables: list[str] = []
    while len(variables) <= num_hops:
        name = "".join(generator.choice(LETTERS, size=5))
        if name not in taken:
            taken.add(name)
            variables.append(name)
    return str(generator.integers(10_000, 100_000)), variables


def assignments(value: str, variables: list[str]) -> list[str]:
    others = [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(variables)]
    return [f"VAR {variables[0]} = {value}.", *others]


def question_of(value: str, variables: list[str]) -> Question:
    return Question(QUESTION.format(value=value, count=len(variables)), tuple(variables))


def worked_example(generator: np.random.Generator, num_hops: int, taken: set[str]) -> str:
    """A chain in a little noise, with its question and answer."""
    value, variables = chain(generator, num_hops, taken)
    text = "\n".join([NOISE, *assignments(value, variables), NOISE])
    question = question_of(value, variables)
    return f"{INTRODUCTION}{text}{question.text} {' '.join(question.answers)}\n\n"


def interleave(generator: np.random.Generator, chains: list[list[str]]) -> list[str]:
    """The lines of all chains in a random order that keeps each chain's own."""
    order = generator.permutation(np.repeat(np.arange(len(chains)), [len(lines) for lines in chains]))
    rest = [iter(lines) for lines in chains]
    return [next(rest[number]) for number in order]


def draw_chains(settings: VariableTrackingSettings, _: float) -> Draw:
    """Draws chains, a worked example, and a question for each chain."""

    def draw(generator: np.random.Generator) -> Draft:
        taken: set[str] = set()
        example = worked_example(generator, settings.num_hops, taken)
        chains = [chain(generator, settings.num_hops, taken) for _ in range(settings.num_chains)]
        needles = interleave(generator, [assignments(value, variables) for value, variables in chains])
        depths = sorted(generator.random(len(needles)).tolist())

        def build(text: str, met: list[float]) -> Prompt:
            return Prompt(example + INTRODUCTION + text, tuple(question_of(*one) for one in chains))

        return Draft(needles, depths, build)

    return draw


TASK = NeedleTask("variable_tracking", draw_chains, noise_haystack)
SUITE = TASK.suite(VariableTrackingSettings)
