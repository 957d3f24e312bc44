"""Symbol ICL: in-context classification of made-up symbols with arbitrary labels, by the number of examples shown.

A symbol is two syllables, the first of which decides its label: four first syllables and one label word for each
class. Symbols seen among the examples need recall alone; unseen ones, new pairs of known syllables, need the rule
(generalisation). Every context has syllables and labels of its own, so nothing can be known beforehand, and chance is
1 / num_labels. One pass over the examples serves all numbers of shots: at each, the state is copied for the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from statex.data.tokenizer import encode_continuation, encode_prompt
from statex.evaluation.context import Context
from statex.evaluation.prompts.needles import common_length
from statex.evaluation.records import Score, digest
from statex.evaluation.suite import Cell, Suite
from statex.settings import MOST_ITEMS, Section, Shots

if TYPE_CHECKING:
    from statex.evaluation.reader import State

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES_PER_LABEL = 4
NUM_ENDINGS = 60
LABELS = ("red", "dog", "sun", "box", "key", "map", "ice", "oak")
EXAMPLE = "{symbol} is {label}\n"
QUERY = "{symbol} is"


DEFAULT_SHOTS = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


class SymbolIclSettings(Section):
    shots: Shots = Field(default=DEFAULT_SHOTS, description="of the default ones, those that the model can read")
    num_labels: int = Field(default=4, ge=2, le=8)
    num_queries: int = Field(
        default=8, ge=1, le=10_000, description="of each kind, seen and unseen, at each number of shots"
    )
    num_items: int = Field(
        default=16, ge=1, le=MOST_ITEMS, description="contexts, each with symbols and labels of its own"
    )


@dataclass(frozen=True)
class SymbolTask:
    """One context: the examples in order, and how a symbol is made and labelled.

    Args:
        labels: first syllable -> label.
        endings: second syllables.
        examples: (symbol, label) in the order they are shown.
    """

    labels: dict[str, str]
    endings: list[str]
    examples: list[tuple[str, str]]

    def shown(self, shots: int) -> str:
        """The text of the first examples, a line each."""
        return "\n" + "".join(EXAMPLE.format(symbol=symbol, label=label) for symbol, label in self.examples[:shots])

    def queries(self, generator: np.random.Generator, shots: int, count: int) -> list[tuple[str, str, str]]:
        """("seen" or "unseen", symbol, label): `count` of each kind; without examples none is seen."""
        seen = list(dict(self.examples[:shots]).items())
        everything = [(first + second, label) for first, label in self.labels.items() for second in self.endings]
        unseen = sorted(set(everything) - set(self.examples))
        drawn = []
        for kind, candidates in (("seen", seen), ("unseen", unseen)):
            for place in generator.choice(len(candidates), size=count) if candidates else []:
                drawn.append((kind, *candidates[place]))
        return drawn


def build_task(generator: np.random.Generator, num_labels: int, num_examples: int) -> SymbolTask:
    """A new context. Half of all symbols are never shown, however many examples there are."""
    syllables = [first + second + third for first in CONSONANTS for second in VOWELS for third in CONSONANTS]
    count = num_labels * SYLLABLES_PER_LABEL
    chosen = generator.permutation(syllables)[: count + NUM_ENDINGS].tolist()
    names = generator.permutation(LABELS)[:num_labels].tolist()
    labels = {syllable: names[place % num_labels] for place, syllable in enumerate(chosen[:count])}
    symbols = [first + second for first in labels for second in chosen[count:]]
    shown = generator.permutation(symbols)[: len(symbols) // 2]
    examples = [(symbol, labels[symbol[:3]]) for symbol in generator.choice(shown, size=num_examples).tolist()]
    return SymbolTask(labels, chosen[count:], examples)


def cells(context: Context) -> list[Cell]:
    context.require_tokenizer("symbol_icl")
    return [Cell(f"context-{number}") for number in range(context.settings("symbol_icl").num_items)]


def score(context: Context, cell: Cell) -> list[Score]:
    import torch

    with torch.inference_mode():
        return _score(context, cell)


def check(context: Context) -> None:
    """Refuse more examples than the model can read, with a question and its answer behind them."""
    shots = max(_shots(context))
    if context.limit is not None:
        context.check_length("evaluation.symbol_icl.shots", shots, _most_tokens(context, shots))


def _shots(context: Context) -> list[int]:
    """The numbers of shots asked for; by default those that the model can read in every context, at least the first."""
    shots = context.settings("symbol_icl").shots
    if context.limit is None or shots != DEFAULT_SHOTS:
        return shots
    number = len(shots)
    while number > 1 and _most_tokens(context, shots[number - 1]) > context.limit:
        number -= 1
    return shots[:number]


def _most_tokens(context: Context, shots: int) -> int:
    """Tokens of the longest context with so many examples, with a question and its answer behind them."""
    tokenizer, most = context.require_tokenizer("symbol_icl"), 0
    for cell in cells(context):
        task, _ = _task_of(context, cell)
        symbols = [first + second for first in task.labels for second in task.endings[:1]]
        questions = [f"\n{EXAMPLE.format(symbol=one, label=label)}" for one in symbols for label in LABELS]
        longest = max(len(encode_continuation(tokenizer, "\n", text)) for text in questions)
        most = max(most, len(encode_prompt(tokenizer, task.shown(shots))) + longest)
    return most


def _task_of(context: Context, cell: Cell) -> tuple[SymbolTask, np.random.Generator]:
    """The cell's context, and the generator that draws its queries."""
    settings = context.settings("symbol_icl")
    generator = np.random.default_rng([context.evaluation.seed, int(cell.name.partition("-")[2])])
    return build_task(generator, settings.num_labels, max(settings.shots)), generator


def _score(context: Context, cell: Cell) -> list[Score]:
    settings, tokenizer, reader = context.settings("symbol_icl"), context.tokenizer, context.reader
    task, generator = _task_of(context, cell)
    all_shots = sorted(_shots(context))
    whole = encode_prompt(tokenizer, task.shown(all_shots[-1]))
    scores, state = [], None
    read: list[int] = []
    for shots in all_shots:
        queries, shown = task.queries(generator, shots, settings.num_queries), task.shown(shots)
        # Each question is tokenised with everything before it, and the common beginning of all is read once
        asked = [encode_prompt(tokenizer, shown + QUERY.format(symbol=symbol)) for _, symbol, _ in queries]
        end = common_length([whole, encode_prompt(tokenizer, shown), *asked])
        if new := whole[len(read) : end]:
            _, state = reader.read([new], state)
            read += new
        rest = [ids[len(read) :] for ids in asked]
        right = _answers(context, state, queries, rest, sorted(set(task.labels.values())))
        for number, ((kind, symbol, label), correct) in enumerate(zip(queries, right, strict=True)):
            scores.append(
                Score(
                    item=f"{cell.name}/{shots}-{number}",
                    cluster=cell.name,
                    slice={"shots": shots, "symbols": kind},
                    scores={"accuracy": float(correct)},
                    digest=digest(read, symbol, label),
                    measured={"tokens": len(read)},
                )
            )
    return scores


def _answers(
    context: Context,
    state: State | None,
    queries: list[tuple[str, str, str]],
    asked: list[list[int]],
    labels: list[str],
) -> list[bool]:
    """Whether the likeliest label, by the log-likelihood of its tokens after the query, is the right one.

    `asked` has the tokens of each query that are not in `state`.
    """
    import torch

    tokenizer, reader = context.tokenizer, context.reader
    rows = []
    for (_, symbol, _), query in zip(queries, asked, strict=True):
        line = "\n" + QUERY.format(symbol=symbol)
        rows += [(query, encode_continuation(tokenizer, line, f" {label}")) for label in labels]
    longest = max(len(query) + len(option) for query, option in rows) - 1
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for row, (query, option) in enumerate(rows):
        whole = torch.tensor(query + option)
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(query) - 1 : len(whole) - 1] = whole[len(query) :]
    before = reader.copy_state(state, [0] * len(rows)) if state is not None else None
    nll = reader.score(ids, targets, before)[0].sum(dim=1)
    likeliest = nll.view(len(queries), len(labels)).argmin(dim=1).tolist()
    return [labels[choice] == label for choice, (_, _, label) in zip(likeliest, queries, strict=True)]


SUITE = Suite(
    name="symbol_icl",
    units={"accuracy": "fraction"},
    groups=(("shots", "symbols"), ("shots",)),
    cells=cells,
    score=score,
    settings=SymbolIclSettings,
    check=check,
)
