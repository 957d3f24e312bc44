"""Symbol ICL: in-context classification of made-up symbols with arbitrary labels, by the number of examples shown.

A symbol is two syllables, the first of which decides its label: four first syllables and one label word for each
class. Symbols seen among the examples need recall alone; unseen ones, new pairs of known syllables, need the rule
(generalisation). Every context has syllables and labels of its own, so nothing can be known beforehand, and chance is
1 / num_labels. One pass over the examples serves all numbers of shots: at each, the state is copied for the queries.
"""

from dataclasses import dataclass

import numpy as np
import torch

from statex.evaluation.context import Cell, Context, Suite
from statex.evaluation.needles import encode_piece, encode_prompt
from statex.evaluation.reader import State
from statex.evaluation.records import Score, digest

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES_PER_LABEL = 4
NUM_ENDINGS = 60
LABELS = ("red", "dog", "sun", "box", "key", "map", "ice", "oak")
EXAMPLE = "{symbol} is {label}\n"
QUERY = "{symbol} is"


@dataclass(frozen=True)
class Task:
    """One context: the examples in order, and how a symbol is made and labelled.

    Args:
        labels: first syllable -> label.
        endings: second syllables.
        examples: (symbol, label) in the order they are shown.
    """

    labels: dict[str, str]
    endings: list[str]
    examples: list[tuple[str, str]]

    def queries(self, generator: np.random.Generator, shots: int, count: int) -> list[tuple[str, str, str]]:
        """("seen" or "unseen", symbol, label): `count` of each kind; none is seen before the first example."""
        seen = list(dict(self.examples[:shots]).items())
        everything = [(first + second, label) for first, label in self.labels.items() for second in self.endings]
        unseen = sorted(set(everything) - set(self.examples))
        drawn = []
        for kind, candidates in (("seen", seen), ("unseen", unseen)):
            for place in generator.choice(len(candidates), size=count) if candidates else []:
                drawn.append((kind, *candidates[place]))
        return drawn


def build_task(generator: np.random.Generator, num_labels: int, num_examples: int) -> Task:
    """A new context. Half of all symbols are never shown, whatever the number of examples."""
    syllables = [first + second + third for first in CONSONANTS for second in VOWELS for third in CONSONANTS]
    count = num_labels * SYLLABLES_PER_LABEL
    chosen = generator.permutation(syllables)[: count + NUM_ENDINGS].tolist()
    names = generator.permutation(LABELS)[:num_labels].tolist()
    labels = {syllable: names[place % num_labels] for place, syllable in enumerate(chosen[:count])}
    symbols = [first + second for first in labels for second in chosen[count:]]
    shown = generator.permutation(symbols)[: len(symbols) // 2]
    examples = [(symbol, labels[symbol[:3]]) for symbol in generator.choice(shown, size=num_examples).tolist()]
    return Task(labels, chosen[count:], examples)


def cells(context: Context) -> list[Cell]:
    context.require_tokenizer("symbol_icl")
    return [Cell(f"context-{number}") for number in range(context.evaluation.symbol_icl.num_items)]


@torch.inference_mode()
def score(context: Context, cell: Cell) -> list[Score]:
    settings, tokenizer, reader = context.evaluation.symbol_icl, context.tokenizer, context.reader
    generator = np.random.default_rng([context.evaluation.seed, int(cell.name.partition("-")[2])])
    task = build_task(generator, settings.num_labels, max(settings.shots))
    scores, shown, read = [], 0, encode_prompt(tokenizer, "\n")
    _, state = reader.read([read])
    for shots in sorted(settings.shots):
        text = "".join(EXAMPLE.format(symbol=symbol, label=label) for symbol, label in task.examples[shown:shots])
        if new := encode_piece(tokenizer, text):
            context.check_length("evaluation.symbol_icl.shots", len(read) + len(new))
            _, state = reader.read([new], state)
            read += new
        shown = shots
        queries = task.queries(generator, shots, settings.num_queries)
        right = _answers(context, state, queries, sorted(set(task.labels.values())))
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


def _answers(context: Context, state: State, queries: list[tuple[str, str, str]], labels: list[str]) -> list[bool]:
    """Whether the likeliest label, by the log-likelihood of its tokens behind the query, is the right one."""
    tokenizer, reader = context.tokenizer, context.reader
    options = [encode_piece(tokenizer, f" {label}") for label in labels]
    asked = [encode_piece(tokenizer, QUERY.format(symbol=symbol)) for _, symbol, _ in queries]
    rows = [(query, option) for query in asked for option in options]
    longest = max(len(query) + len(option) for query, option in rows) - 1
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    targets = torch.full_like(ids, -100)
    for row, (query, option) in enumerate(rows):
        whole = torch.tensor(query + option)
        ids[row, : len(whole) - 1] = whole[:-1]
        targets[row, len(query) - 1 : len(whole) - 1] = whole[len(query) :]
    nll = reader.score(ids, targets, reader.copy_state(state, [0] * len(rows)))[0].sum(dim=1)
    likeliest = nll.view(len(queries), len(labels)).argmin(dim=1).tolist()
    return [labels[choice] == label for choice, (_, _, label) in zip(likeliest, queries, strict=True)]


SUITE = Suite(
    name="symbol_icl",
    units={"accuracy": "fraction"},
    groups=(("shots", "symbols"), ("shots",)),
    cells=cells,
    score=score,
)
