"""What the sections of a recipe are made of, and the sections that evaluation shares with data. No torch."""

import datetime
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from statex.errors import UserError
from statex.utils.nested import is_unicode, single_values

NUMBERS_END = 2**32
"""Every number in a recipe is smaller than this in absolute value."""
MOST_TOKENS = 2**22
"""Tokens of a sequence, and of the longest prompt of an evaluation."""
MOST_VOCABULARY = 2**20
"""Tokens of a vocabulary: four times the largest that are published."""
MOST_NUMBERS = 2**27
"""Numbers that the recall data of one step, or of one cell of an evaluation, may hold at once: half a gigabyte."""
MOST_ITEMS = 100_000
"""Questions in a cell of an evaluation; no interval needs more."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""A name that is also the name of a folder."""
Text = Annotated[str, Field(min_length=1)]
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""For a tuple, which TOML does not have."""
Beta = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Counts = Annotated[list[PositiveInt], Field(min_length=1)]
"""At least one number, none below 1."""
Lengths = Annotated[list[Annotated[int, Field(ge=1, le=MOST_TOKENS)]], Field(min_length=1)]
"""At least one number of tokens."""
Shots = Annotated[list[Annotated[int, Field(ge=0, le=2**16)]], Field(min_length=1)]
BatchSizes = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=1)]


class Section(BaseModel):
    """A part of a recipe; an unknown key is an error, and so is a value that no key can take.

    TOML is typed: true, "1" and 1.0 are not 1; but an integer is accepted where any number may stand.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, values: Any) -> Any:
        check_plain(values)
        return values


def check_plain(values: Any) -> None:
    """Refuse values that no key of a recipe can take, at any depth.

    Raises:
        UserError: a number that is not finite or reaches NUMBERS_END, a date, text with a NUL or that is not Unicode,
            or tables and lists nested too deeply.
    """
    for keys, value in single_values(values, "flatten it"):
        if complaint := _complaint(value):
            raise UserError(".".join(keys), value, *complaint)


def _complaint(value: Any) -> tuple[str, str] | None:
    """What is wrong with a number or text, whatever its key, and what to do; None where it is fine."""
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number", "give a finite one"
    if isinstance(value, int | float) and abs(value) >= NUMBERS_END:
        return f"is out of range: its absolute value must be below {NUMBERS_END}", "give one closer to 0"
    if isinstance(value, datetime.date | datetime.time):
        return "is a date or time, which no key takes", "put it in quotation marks if text is meant"
    if isinstance(value, str) and ("\0" in value or not is_unicode(value)):
        return "has an invalid character (NUL, or half of a surrogate pair)", "remove it"
    return None


class TextSource(Section):
    """Where documents come from: exactly one of a hub data set, files, or Python's own standard library.

    `files` are paths or globs; relative ones are looked up from the folder of the recipe. The ending of a file,
    whatever its case, says what it is: .jsonl (or .ndjson), .json, .csv, .tsv and .parquet are tables, of which only
    the column `field` is read; .txt, .md, .py and their like are plain text, one document per file. All but parquet may
    be compressed (.gz, .bz2, .xz, .zst). A file of any other ending needs `format`.
    """

    hub: Text | None = Field(default=None, description="data set on the Hugging Face hub")
    hub_config: str | None = None
    hub_revision: Text | None = Field(
        default=None, description="branch, tag or commit of the hub's data; default: what the hub has when it is read"
    )
    split: str = "train"
    files: list[str] | None = None
    standard_library: bool = Field(default=False, description="sources of Python's standard library")
    format: Literal["text", "jsonl", "json", "csv", "tsv", "parquet"] | None = Field(
        default=None, description="format of all files; default: as the ending of each says"
    )
    bad_records: Literal["error", "skip"] = Field(
        default="error",
        description="what to do about a record that cannot be read (a line that is not JSON or not UTF-8, or has no "
        "text in `field`): stop, or skip it; skipped records are counted and reported",
    )
    field: str = Field(default="text", description="column of tables and hub data that holds the text")
    held_out: float = Field(default=0.05, gt=0, lt=1, description="share of the documents kept for evaluation")

    @model_validator(mode="after")
    def _one_source(self):
        given = [name for name in ("hub", "files", "standard_library") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError("needs exactly one of hub, files and standard_library; give one of them")
        return self

    def identity(self) -> dict[str, Any]:
        """What determines which documents these are: all but the handling of those that cannot be read."""
        names = {"bad_records"} if self.hub_revision else {"bad_records", "hub_revision"}  # earlier versions had none
        return self.model_dump(mode="json", exclude=names)


class Recall(Section):
    """Synthetic associative recall (MQAR, arXiv 2312.04927): pairs of a key and a value, then queries for values.

    Every batch is one of `shapes`, chosen at random.
    """

    num_keys: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    num_values: int = Field(default=64, ge=2, le=MOST_VOCABULARY)
    shapes: list[Annotated[tuple[int, int], FromList]] = Field(
        default=[(16, 4), (32, 8), (64, 16), (128, 32)], description="(sequence length, number of pairs)"
    )

    @model_validator(mode="after")
    def _shapes_fit(self):
        for length, pairs in self.shapes:
            if not 1 <= pairs <= min(self.num_keys, self.num_values, length // 4):
                problem = "has no pairs, or more than num_keys, num_values or a quarter of its length"
                raise UserError("shapes", [length, pairs], problem, "give fewer pairs or a longer length")
        return self


class Forms(Section):
    """Recall in words: phone books, facts, needles and copies (`training.weights`)."""

    lengths: Lengths | None = Field(
        default=None, description="tokens of a text, one length drawn for each step; default: training.sequence_length"
    )
    num_questions: int = Field(default=4, ge=1, le=64, description="asked by a text, at most")


class Tokenizer(Section):
    """The byte-level BPE tokenizer that is trained from the recipe's text when a model is made from scratch."""

    vocab_size: int = Field(
        default=512, ge=300, le=MOST_VOCABULARY, description="including the 256 bytes and the reserved recall tokens"
    )
    training_bytes: int = Field(default=5_000_000, ge=1, description="of text to train it on, at most")


class Data(Section):
    text: TextSource = TextSource(standard_library=True)
    recall: Recall = Recall()
    forms: Forms = Forms()
    tokenizer: Tokenizer = Tokenizer()
    reset_state_at_documents: bool = Field(
        default=False, description="start a fresh state at each document border of a packed sequence"
    )
    shuffle_buffer: int = Field(default=1000, ge=1, description="documents in the buffer that shuffling draws from")
    seed: int = Field(
        default=0, ge=0, description="of the order of the data, which also depends on each of the run's seeds"
    )
    tokens: Text | None = Field(
        default=None, description="folder of prepared tokens; default: `tokens` beside the runs"
    )
    workers: int | None = Field(
        default=None, ge=0, le=64, description="processes that make batches; default: 2 where a GPU trains, else none"
    )
