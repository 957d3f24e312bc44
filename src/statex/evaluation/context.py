"""What every suite is given: the model's reader, tokenizer, text and settings; and what a suite is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statex.errors import UserError
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score
from statex.recipe import Evaluation, Recall, TextSource


@dataclass(frozen=True)
class Cell:
    """A part of a suite that is scored, and kept, as one: a length and depth, a number of pairs, or all of it."""

    name: str
    slice: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """Args:
    reader: the model.
    tokenizer: the model's, None for a model of bare ids.
    evaluation: the recipe's section.
    text: where held-out documents and haystacks come from.
    count_text: where the bigrams of AR-hits are counted; its part that is kept for training is read.
    training_length: tokens of a training sequence, where it is known.
    limit: the most tokens the model can read, None for a purely recurrent one.
    shared: a folder for what several models' evaluations can share (the count table), None to keep nothing.
    recall: what the model was trained to recall, None where it was not, or where that is not known.
    """

    reader: Reader
    tokenizer: Any
    evaluation: Evaluation
    text: TextSource
    count_text: TextSource
    training_length: int | None = None
    limit: int | None = None
    shared: Path | None = None
    recall: Recall | None = None

    def check_length(self, field_name: str, tokens: int) -> None:
        """Refuse a prompt that the model cannot read whole; nothing is ever cut."""
        if self.limit is not None and tokens > self.limit:
            raise UserError(
                field_name,
                tokens,
                f"is more than the {self.limit} tokens that this model's attention can read (max_position_embeddings)",
                f"use lengths to {self.limit}",
            )

    def require_tokenizer(self, suite: str) -> Any:
        if self.tokenizer is None:
            raise UserError(
                "evaluation.suites", suite, "needs a tokenizer, and the model has none", "give one, or drop this suite"
            )
        return self.tokenizer


def text_source(evaluation: Evaluation, text: TextSource | None) -> TextSource:
    """Where held-out documents come from: `text`, else the evaluation's, else Python's standard library."""
    return text or evaluation.text or TextSource(standard_library=True)


@dataclass(frozen=True)
class Suite:
    """One suite: what it asks, in cells, and which figures its items give.

    Args:
        name: as recipes and the command line call it.
        units: metric -> unit; a "fraction" lies between 0 and 1.
        groups: the keys of a slice by which figures are reported, () for all items in one.
        cells: the cells in order, cheap to list.
        score: the scores of one cell's items.
        check: raises what making the items would, as far as it shows without the model and at little cost.
        paired: whether its items are the same for every model, so that arms can be compared one by one.
    """

    name: str
    units: dict[str, str]
    groups: tuple[tuple[str, ...], ...]
    cells: Callable[[Context], list[Cell]]
    score: Callable[[Context, Cell], list[Score]]
    check: Callable[[Context], object] = lambda context: None
    paired: bool = True
