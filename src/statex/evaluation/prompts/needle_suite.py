"""Suites that insert needles into a haystack and ask for them, by length and, for a single needle, by depth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from statex.evaluation.context import Context
from statex.evaluation.prompts.grids import check_lengths, grid_depths, grid_lengths
from statex.evaluation.prompts.haystack import Haystack
from statex.evaluation.prompts.insertion import Draw, build_prompts, shortest_length
from statex.evaluation.prompts.needles import Prompt, score_prompts
from statex.evaluation.records import Score
from statex.evaluation.suite import Cell, Suite
from statex.settings import MOST_ITEMS, Lengths, Section


class LengthSettings(Section):
    """Suites that ask at several lengths."""

    lengths: Lengths | None = Field(
        default=None,
        description="tokens of context, question and answer together; default: what model and device allow",
    )


class GridSettings(LengthSettings):
    """A grid of lengths and depths."""

    num_depths: int = Field(default=5, ge=1, le=1000)
    num_items: int = Field(default=20, ge=1, le=MOST_ITEMS, description="questions in each cell of the grid")


@dataclass(frozen=True)
class NeedleTask:
    """The task of such a suite.

    Args:
        name: the suite's.
        draw: draws one prompt, given the suite's settings and the depth of its needle (where it has only one).
        haystack: makes a haystack for contexts of a number of tokens.
        by_depth: whether each cell has a depth of its own.
    """

    name: str
    draw: Callable[[Any, float], Draw]
    haystack: Callable[[Context, int], Haystack]
    by_depth: bool = False

    def cells(self, context: Context) -> list[Cell]:
        settings = context.settings(self.name)
        context.require_tokenizer(self.name)

        def has_text(length: int) -> bool:
            return self.haystack(context, length).holds(length)

        lengths = grid_lengths(context, self.name, settings.lengths, self.shortest(context), has_text)
        if not self.by_depth:
            return [Cell(f"length-{length}", {"length": length}) for length in lengths]
        return [
            Cell(f"length-{length}-depth-{depth}", {"length": length, "depth": depth})
            for length in lengths
            for depth in grid_depths(settings.num_depths)
        ]

    def shortest(self, context: Context) -> int:
        """Tokens that any of its questions fits into."""
        return shortest_length(context, self.draw(context.settings(self.name), 0.5))

    def prompts(self, context: Context, cell: Cell) -> list[Prompt]:
        """The cell's prompts, the same for every model with this tokenizer and text."""
        settings, length = context.settings(self.name), cell.slice["length"]
        depth = cell.slice["depth"] if self.by_depth else 0.5
        seed = [round(10_000 * depth)] if self.by_depth else []
        haystack, draw = self.haystack(context, length), self.draw(settings, depth)
        field_name = f"evaluation.{self.name}.lengths"
        return build_prompts(context, field_name, haystack, draw, settings.num_items, length, *seed)

    def score(self, context: Context, cell: Cell) -> list[Score]:
        max_new_tokens = context.settings(self.name).max_new_tokens
        return score_prompts(context, cell, self.prompts(context, cell), max_new_tokens)

    def suite(self, settings: type[Section], *, depth_of_questions: bool = False) -> Suite:
        """The suite; `depth_of_questions` says that each of a prompt's questions has a depth of its own."""
        by_depth = self.by_depth or depth_of_questions
        return Suite(
            name=self.name,
            units={"accuracy": "fraction", "answer_nll": "nats"},
            groups=(("length", "depth"), ("length",)) if by_depth else (("length",),),
            cells=self.cells,
            score=self.score,
            settings=settings,
            check=lambda context: check_lengths(context, self.name, self.prompts, self.shortest),
        )
