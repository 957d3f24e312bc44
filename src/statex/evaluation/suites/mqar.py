"""MQAR: multi-query associative recall by number of pairs (Zoology, arXiv 2312.04927)."""

import numpy as np
from pydantic import Field, model_validator

from statex.data.tokenizer import recall_vocabulary
from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.records import Score, digest, item_score
from statex.evaluation.suite import Cell, Suite
from statex.settings import MOST_NUMBERS, MOST_VOCABULARY, Counts, Recall, Section

TOKENS_PER_PAIR = 4
"""The dense form: two tokens of a pair and two of its query, as in training."""


class MqarSettings(Section):
    num_pairs: Counts = Field(default=[4, 8, 16, 32])
    num_keys: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_values: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_items: int = Field(default=200, ge=1, description="sequences for each number of pairs")

    @model_validator(mode="after")
    def _pairs_fit(self):
        most = min(self.num_keys, self.num_values)
        for pairs in self.num_pairs:
            if not 1 <= pairs <= most:
                remedy = f"give 1 to {most} pairs"
                raise UserError("num_pairs", pairs, "does not fit num_keys and num_values", remedy)
        row = max(self.num_keys, self.num_values, 4 * max(self.num_pairs))
        if self.num_items * row > MOST_NUMBERS:
            problem = f"the items of one number of pairs, {row} numbers each, do not fit into memory together"
            raise UserError("num_items", self.num_items, problem, f"give at most {MOST_NUMBERS // row}")
        return self


def vocabulary(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """(num_keys,) and (num_values,) ids; without a tokenizer, the last ids of the model's vocabulary."""
    settings = context.settings("mqar")
    if context.tokenizer is not None:
        try:
            asked = recall_vocabulary(context.tokenizer, settings.num_keys, settings.num_values)
        except UserError as error:
            raise UserError(f"evaluation.mqar.{error.field}", error.value, error.problem, error.remedy) from error
        if context.recall is not None:
            _check_trained(context, context.recall, asked)
        return asked
    end, count = context.reader.vocab_size, settings.num_keys + settings.num_values
    if count > end:
        raise UserError(
            "evaluation.mqar.num_keys",
            settings.num_keys,
            f"together with num_values = {settings.num_values} is more than the model's vocabulary of {end}",
            "lower num_keys or num_values",
        )
    return np.arange(end - count, end - settings.num_values), np.arange(end - settings.num_values, end)


def _check_trained(context: Context, recall: Recall, asked: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse keys and values that training does not use: a model cannot treat as a key what it only saw as a value."""
    trained = recall_vocabulary(context.tokenizer, recall.num_keys, recall.num_values)
    for name, ids, known in zip(("num_keys", "num_values"), asked, trained, strict=True):
        if not set(ids) <= set(known):
            raise UserError(
                f"evaluation.mqar.{name}",
                len(ids),
                "asks for tokens that do not occur in training, with data.recall.num_keys = "
                f"{recall.num_keys} and num_values = {recall.num_values}",
                "give evaluation.mqar the same num_keys and num_values",
            )


def check(context: Context) -> None:
    """Refuse more pairs than the model can read, and what `vocabulary` refuses."""
    vocabulary(context)
    for num_pairs in context.settings("mqar").num_pairs:
        context.check_length("evaluation.mqar.num_pairs", num_pairs, TOKENS_PER_PAIR * num_pairs)


def cells(context: Context) -> list[Cell]:
    return [
        Cell(f"pairs-{num_pairs}", {"num_pairs": num_pairs, "length": TOKENS_PER_PAIR * num_pairs})
        for num_pairs in context.settings("mqar").num_pairs
    ]


def score(context: Context, cell: Cell) -> list[Score]:
    from statex.data.recall import mqar_batch

    settings = context.settings("mqar")
    num_pairs, length = cell.slice["num_pairs"], cell.slice["length"]
    seed = [context.evaluation.seed, num_pairs]
    ids, labels = mqar_batch(seed, settings.num_items, length, num_pairs, *vocabulary(context))
    counts = context.score(ids, labels)[1].sum(dim=1).tolist()
    return [
        item_score(cell, number, {"accuracy": count / num_pairs}, digest=digest(row.tolist()), tokens=length)
        for number, (row, count) in enumerate(zip(ids, counts, strict=True))
    ]


SUITE = Suite(
    name="mqar",
    units={"accuracy": "fraction"},
    groups=(("num_pairs", "length"),),
    cells=cells,
    score=score,
    settings=MqarSettings,
    check=check,
)
