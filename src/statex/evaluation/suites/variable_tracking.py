"""Variable tracking (RULER, arXiv 2404.06654): chains of assignments in noise; name all variables of a value.

A short worked example stands before the context, as in RULER. A question's accuracy is the share of its chain's
variables that the model names.
"""

import itertools

import numpy as np

from statex.evaluation.context import Cell, Context, Suite
from statex.evaluation.prompts.grids import check_lengths, grid_lengths
from statex.evaluation.prompts.haystack import NOISE, noise_haystack
from statex.evaluation.prompts.insertion import Draft, Draw, build_prompts, shortest_length
from statex.evaluation.prompts.needles import Prompt, Question, score_prompts
from statex.evaluation.records import Score

INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))


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
    """A chain in a little noise, asked and answered."""
    value, variables = chain(generator, num_hops, taken)
    text = "\n".join([NOISE, *assignments(value, variables), NOISE])
    question = question_of(value, variables)
    return f"{INTRODUCTION}{text}{question.text} {' '.join(question.answers)}\n\n"


def interleave(generator: np.random.Generator, chains: list[list[str]]) -> list[str]:
    """The lines of all chains in a random order that keeps each chain's own."""
    order = generator.permutation(np.repeat(np.arange(len(chains)), [len(lines) for lines in chains]))
    rest = [iter(lines) for lines in chains]
    return [next(rest[number]) for number in order]


def draw_chains(num_chains: int, num_hops: int) -> Draw:
    """Draws chains, a worked example, and a question for each chain."""

    def draw(generator: np.random.Generator) -> Draft:
        taken: set[str] = set()
        example = worked_example(generator, num_hops, taken)
        chains = [chain(generator, num_hops, taken) for _ in range(num_chains)]
        needles = interleave(generator, [assignments(value, variables) for value, variables in chains])
        depths = sorted(generator.random(len(needles)).tolist())

        def build(text: str, met: list[float]) -> Prompt:
            return Prompt(example + INTRODUCTION + text, tuple(question_of(*one) for one in chains))

        return Draft(needles, depths, build)

    return draw


def cells(context: Context) -> list[Cell]:
    settings = context.evaluation.variable_tracking
    context.require_tokenizer("variable_tracking")
    shortest = shortest_length(context, draw_chains(settings.num_chains, settings.num_hops))
    lengths = grid_lengths(context, "variable_tracking", settings.lengths, shortest)
    return [Cell(f"length-{length}", {"length": length}) for length in lengths]


def cell_prompts(context: Context, cell: Cell) -> list[Prompt]:
    """The cell's contexts, each with a question for every chain."""
    settings, length = context.evaluation.variable_tracking, cell.slice["length"]
    haystack, draw = noise_haystack(context.tokenizer), draw_chains(settings.num_chains, settings.num_hops)
    return build_prompts(context, "evaluation.variable_tracking.lengths", haystack, draw, settings.num_items, length)


def score(context: Context, cell: Cell) -> list[Score]:
    prompts, settings = cell_prompts(context, cell), context.evaluation.variable_tracking
    return score_prompts(context, "variable_tracking", cell, prompts, settings.max_new_tokens)


SUITE = Suite(
    name="variable_tracking",
    units={"accuracy": "fraction", "answer_nll": "nats"},
    groups=(("length",),),
    cells=cells,
    score=score,
    check=lambda context: check_lengths(context, "variable_tracking", cell_prompts),
)
