"""MQAR: multi-query associative recall by number of pairs (Zoology, arXiv 2312.04927)."""

import numpy as np

from statex.data.recall import mqar_batch
from statex.data.tokenizer import recall_vocabulary
from statex.errors import UserError
from statex.evaluation.context import Cell, Context, Suite
from statex.evaluation.records import Score, digest
from statex.recipe import Recall

TOKENS_PER_PAIR = 4
"""The dense form: two tokens of a pair and two of its query, as in training."""


def vocabulary(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """(num_keys,) and (num_values,) ids; without a tokenizer, the last ids of the model's vocabulary."""
    settings = context.evaluation.mqar
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
            f"with num_values = {settings.num_values} it is more than the model's vocabulary of {end}",
            "lower num_keys or num_values",
        )
    return np.arange(end - count, end - settings.num_values), np.arange(end - settings.num_values, end)


def _check_trained(context: Context, recall: Recall, asked: tuple[np.ndarray, np.ndarray]) -> None:
    """Refuse keys and values that are others in training: a model knows no key that it has only met as a value."""
    trained = recall_vocabulary(context.tokenizer, recall.num_keys, recall.num_values)
    for name, ids, known in zip(("num_keys", "num_values"), asked, trained, strict=True):
        if not set(ids) <= set(known):
            raise UserError(
                f"evaluation.mqar.{name}",
                len(ids),
                "asks for other tokens than training shows, by data.recall.num_keys = "
                f"{recall.num_keys} and num_values = {recall.num_values}",
                "give evaluation.mqar the same num_keys and num_values",
            )


def cells(context: Context) -> list[Cell]:
    return [
        Cell(f"pairs-{num_pairs}", {"num_pairs": num_pairs, "length": TOKENS_PER_PAIR * num_pairs})
        for num_pairs in context.evaluation.mqar.num_pairs
    ]


def score(context: Context, cell: Cell) -> list[Score]:
    settings, batch = context.evaluation.mqar, context.evaluation.batch_size
    num_pairs, length = cell.slice["num_pairs"], cell.slice["length"]
    context.check_length("evaluation.mqar.num_pairs", length)
    seed = [context.evaluation.seed, num_pairs]
    ids, labels = mqar_batch(seed, settings.num_items, length, num_pairs, *vocabulary(context))
    scores = []
    for start in range(0, len(ids), batch):
        rows, targets = ids[start : start + batch], labels[start : start + batch, 1:]
        _, right = context.reader.score(rows[:, :-1], targets)
        for number, (row, answers) in enumerate(zip(rows, right, strict=True), start):
            scores.append(
                Score(
                    item=f"{cell.name}/{number}",
                    cluster=f"{cell.name}/{number}",
                    slice=cell.slice,
                    scores={"accuracy": float(answers.sum()) / num_pairs},
                    digest=digest(row.tolist()),
                    measured={"tokens": length},
                )
            )
    return scores


SUITE = Suite(
    name="mqar",
    units={"accuracy": "fraction"},
    groups=(("num_pairs", "length"),),
    cells=cells,
    score=score,
    check=vocabulary,
)
