"""Recall in words: phone books, facts, needles and copies, by form and length.

Forms that training left out test whether recall carries over. A text asks several questions, one after the other, each
followed by its right answer. An answer is right if every one of its tokens is the model's first choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, field_validator

from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.prompts.grids import check_lengths, grid_lengths
from statex.evaluation.prompts.needle_suite import LengthSettings
from statex.evaluation.records import Score, digest, item_score
from statex.evaluation.suite import Cell, Suite
from statex.settings import MOST_ITEMS

if TYPE_CHECKING:
    from statex.data.forms import FormItem

NAMES = ("phone_book", "facts", "needles", "copy_words")
SHORTEST = 128


class RecallFormsSettings(LengthSettings):
    forms: list[str] = Field(default=list(NAMES), min_length=1, description="forms of training.weights to measure")
    num_questions: int = Field(default=4, ge=1, le=64, description="asked by a text, at most")
    num_items: int = Field(default=50, ge=1, le=MOST_ITEMS, description="texts of each form and length")

    @field_validator("forms")
    @classmethod
    def _known(cls, forms: list[str]) -> list[str]:
        if unknown := [form for form in forms if form not in NAMES]:
            raise UserError("forms", unknown[0], "is unknown", f"use some of {', '.join(NAMES)}")
        return forms


def cells(context: Context) -> list[Cell]:
    settings = context.settings("recall_forms")
    context.require_tokenizer("recall_forms")
    lengths = grid_lengths(context, "recall_forms", settings.lengths, SHORTEST)
    return [
        Cell(f"{form}-length-{length}", {"form": form, "length": length})
        for form in settings.forms
        for length in lengths
    ]


def build_items(context: Context, cell: Cell) -> list[FormItem]:
    """The cell's texts, the same for every model with this tokenizer."""
    from statex.data.forms import FormBuilder

    settings, length = context.settings("recall_forms"), cell.slice["length"]
    items = []
    for form in [cell.slice["form"]] if "form" in cell.slice else settings.forms:
        builder = FormBuilder(context.require_tokenizer("recall_forms"), form, settings.num_questions)
        generator = np.random.default_rng([context.evaluation.seed, length, NAMES.index(form)])
        try:
            items += [builder.build(generator, length) for _ in range(settings.num_items)]
        except UserError as error:
            raise UserError("evaluation.recall_forms.lengths", length, error.problem, error.remedy) from error
    return items


def score(context: Context, cell: Cell) -> list[Score]:
    import torch

    items, scores = build_items(context, cell), []
    ids = torch.from_numpy(np.stack([item.ids for item in items]))
    question = torch.from_numpy(np.stack([item.question for item in items]))
    nll, right = context.score(ids, torch.where(question >= 0, ids, -100))
    for number, (item, asked) in enumerate(zip(items, question[:, 1:], strict=True)):
        answered = [bool(right[number][asked == each].all()) for each in range(int(asked.max()) + 1)]
        values = {
            "accuracy": sum(answered) / len(answered),
            "answer_nll": float(nll[number].sum()) / int((asked >= 0).sum()),
        }
        scores.append(item_score(cell, number, values, digest=digest(item.ids), facts=item.num_facts))
    return scores


SUITE = Suite(
    name="recall_forms",
    units={"accuracy": "fraction", "answer_nll": "nats"},
    groups=(("form", "length"), ("form",)),
    cells=cells,
    score=score,
    settings=RecallFormsSettings,
    check=lambda context: check_lengths(context, "recall_forms", build_items, lambda _: SHORTEST),
)
