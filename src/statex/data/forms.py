"""Recall written in words: phone books, facts, needles in filler and copies, for training and for questions alike.

A text in one of these forms states a number of facts and then asks for some of them. Train on some forms and hold the
others out (weight 0), and the suite `recall_forms` measures whether recall carries over.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from statex.data.recall import FILLER, IGNORED
from statex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_NAMES = """
Ada Alan Alice Amir Anna Boris Carla Chen Clara David Dora Edgar Elena Emil Erik Fatima Felix Greta Hana Hugo Ida Ivan
Jana Jonas Karim Lars Laura Leo Lina Lucy Maria Marta Max Mina Nadia Nils Nora Olga Omar Oscar Paul Petra Rosa Ruth
Sara Sofia Tariq Tom Vera Yuki
"""
LAST_NAMES = """
Adler Baker Bauer Berg Bishop Blum Brook Carter Castro Clark Costa Cruz Dahl Diaz Duarte Engel Fischer Fox Garcia Gray
Haas Hill Hoffman Ito Jensen Kaya Keller Klein Kovac Lang Lee Lopez Marsh Meyer Moore Moss Novak Olsen Park Pavlov
Reed Rossi Sato Silva Stone Tanaka Vogel Walker Weber Wolf
"""
THINGS = """
bicycle boat camera car chair clock coat cup door dress guitar hat house jacket kite lamp piano ring scarf tent
umbrella violin wagon
"""
COLOURS = """
amber azure beige black blue bronze brown copper crimson cyan golden gray green indigo ivory khaki lilac maroon olive
orange pink purple red ruby scarlet silver teal turquoise violet white yellow
"""
WORDS = f"{THINGS} {COLOURS}"


@dataclass(frozen=True)
class Fact:
    """One thing that a text states.

    Args:
        statement: in the text.
        question: behind it, up to the answer.
        answer: what follows the question, with the space before it.
    """

    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class Form:
    """How such a text is written.

    Args:
        draw: draws a fact with a generator.
        heading: what the text begins with.
        num_facts: how many facts it states, or as many of them as fit; None: as many as fit the length.
        has_filler: whether sentences that say nothing fill the room between them.
    """

    draw: Callable[[np.random.Generator], Fact]
    heading: str = ""
    num_facts: int | None = None
    has_filler: bool = False


def _digits(generator: np.random.Generator, count: int) -> str:
    return str(generator.integers(10 ** (count - 1), 10**count))


def _one_of(generator: np.random.Generator, words: str) -> str:
    choices = _split(words)
    return choices[generator.integers(len(choices))]


@functools.cache
def _split(words: str) -> list[str]:
    return words.split()


def _name(generator: np.random.Generator) -> str:
    return f"{_one_of(generator, FIRST_NAMES)} {_one_of(generator, LAST_NAMES)}"


def _phone_number(generator: np.random.Generator) -> Fact:
    name, number = _name(generator), f"{_digits(generator, 3)}-{_digits(generator, 4)}"
    return Fact(f"{name}: {number}\n", f"The number of {name} is", f" {number}")


def _colour(generator: np.random.Generator) -> Fact:
    name, thing, colour = _name(generator), _one_of(generator, THINGS), _one_of(generator, COLOURS)
    return Fact(f"The {thing} of {name} is {colour}. ", f"What is the colour of {name}'s {thing}? It is", f" {colour}")


def _magic_number(generator: np.random.Generator) -> Fact:
    word, number = f"{_one_of(generator, COLOURS)} {_one_of(generator, THINGS)}", _digits(generator, 5)
    statement = f"The magic number of the {word} is {number}. "
    return Fact(statement, f"The magic number of the {word} is", f" {number}")


def _code_words(generator: np.random.Generator) -> Fact:
    words = " ".join(_one_of(generator, WORDS) for _ in range(8))
    return Fact(f"The code words are {words}. ", "Once more, the code words are", f" {words}")


FORMS: dict[str, Form] = {
    "phone_book": Form(_phone_number, heading="Phone book\n"),
    "facts": Form(_colour),
    "needles": Form(_magic_number, num_facts=4, has_filler=True),
    "copy_words": Form(_code_words, num_facts=1, has_filler=True),
}
"""Every form by its name, which is that of its weight in a recipe."""


@dataclass(frozen=True)
class FormItem:
    """A text with its questions.

    Args:
        ids: (T,) its tokens, end-of-text tokens behind them.
        question: (T,) the number of the question whose answer the token belongs to, -1 elsewhere.
        num_facts: how many facts the text states.
    """

    ids: np.ndarray
    question: np.ndarray
    num_facts: int


class FormBuilder:
    """Texts of one form.

    Args:
        tokenizer: a fast one; text is tokenised as a whole, and the tokens of answers are found by their place in it.
        form: a name in FORMS.
        num_questions: how many questions a text asks, about facts drawn at random; fewer where it states fewer.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", form: str, num_questions: int):
        if form not in FORMS:
            raise UserError("form", form, "is unknown", f"use one of {', '.join(FORMS)}")
        self.tokenizer, self.name, self.form, self.num_questions = tokenizer, form, FORMS[form], num_questions
        self._least, self._tokens_of_least, self._tokens_per_unit = self._estimate()

    def build(self, generator: np.random.Generator, length: int) -> FormItem:
        """A text that nearly fills `length` tokens, as far as there are different facts.

        Raises:
            UserError: the length has no room for the fewest statements and their questions.
        """
        low = 0 if self.form.has_filler else 1
        if (room := length - self._tokens_of_least) > 0:
            amount = self._least + math.ceil(1.05 * room / self._tokens_per_unit)
        else:  # with fewer statements there are fewer questions
            amount = max(low, math.ceil(1.05 * self._least * length / self._tokens_of_least))
        facts = self._distinct(generator, self.form.num_facts or amount)
        seed = int(generator.integers(2**63))  # places and questions are drawn alike for every amount that is tried
        amount = amount if self.form.has_filler else min(amount, len(facts))
        while True:
            written = self._written(facts, amount, seed)
            encoded = self._encoded(written)
            excess = len(encoded["input_ids"]) - length
            if excess <= 0:
                return self._item(written, encoded, length)
            if amount == low and self.form.has_filler and len(facts) > 1:
                facts = facts[:-1]
                continue
            if amount == low:
                problem = f"has no room for a text of the form {self.name}, which takes {length + excess} tokens"
                raise UserError("length", length, problem, "ask for longer texts, or leave the form out")
            per_unit = self._tokens_per_unit
            if amount <= self._least:  # each of these statements has its question
                per_unit = self._tokens_of_least / self._least
            amount = max(low, amount - max(1, int(excess / per_unit)))

    def _estimate(self) -> tuple[int, int, float]:
        """A number of statements (or sentences of filler), their tokens with all questions, and the tokens of one more.

        Measured on one sample for all texts: a text must follow from its generator alone.
        """
        least, more = 0 if self.form.has_filler else self.num_questions, 16
        facts = self._distinct(np.random.default_rng(0), self.form.num_facts or least + more)
        tokens, of_more = (
            len(self._encoded(self._written(facts, amount, 0))["input_ids"]) for amount in (least, least + more)
        )
        return least, tokens, max(1.0, (of_more - tokens) / more)

    def _encoded(self, written: "_Written") -> Any:
        return self.tokenizer(written.text, return_offsets_mapping=True, verbose=False)

    def _distinct(self, generator: np.random.Generator, count: int) -> list[Fact]:
        """`count` facts with different questions, or as many as a few extra draws find."""
        facts: dict[str, Fact] = {}
        for _ in range(2 * count + 10):
            fact = self.form.draw(generator)
            facts.setdefault(fact.question, fact)
            if len(facts) == count:
                break
        return list(facts.values())

    def _written(self, facts: list[Fact], amount: int, seed: int) -> "_Written":
        """The text with `amount` statements or, where there is filler, that many sentences of it between them."""
        generator = np.random.default_rng(seed)
        filler = amount if self.form.has_filler else 0
        stated = facts if self.form.has_filler else facts[:amount]
        places = sorted((generator.random(len(stated)) * (filler + 1)).astype(int).tolist())
        text, at = self.form.heading, 0
        for fact, place in zip(stated, places, strict=True):
            text += _filler(at, place) + fact.statement
            at = place
        text += _filler(at, filler)
        spans = []
        for number in generator.permutation(len(stated))[: self.num_questions]:
            text = f"{text.rstrip()}\n{stated[number].question}"
            spans.append((len(text), len(text) + len(stated[number].answer)))
            text += f"{stated[number].answer}."
        return _Written(text, spans, len(stated))

    def _item(self, written: "_Written", encoded: Any, length: int) -> FormItem:
        ids = encoded["input_ids"]
        firsts, lasts = np.array(encoded["offset_mapping"]).T
        question = np.full(length, -1)
        for number, (begin, end) in enumerate(written.spans):
            question[: len(ids)][(firsts < end) & (lasts > begin) & (lasts > firsts)] = number
        rest = [self.tokenizer.eos_token_id] * (length - len(ids))
        return FormItem(np.array([*ids, *rest], dtype=np.int64), question, written.num_facts)


@dataclass(frozen=True)
class _Written:
    """A text, the character ranges of its answers, and how many facts it states."""

    text: str
    spans: list[tuple[int, int]]
    num_facts: int


def _filler(first: int, end: int) -> str:
    return "".join(f"{FILLER[i % len(FILLER)]} " for i in range(first, end))


def form_batch(
    generator: np.random.Generator, num_sequences: int, length: int, builder: FormBuilder
) -> tuple[Tensor, Tensor]:
    """Texts of a form, for training; only answers have labels.

    Returns:
        input_ids and labels, (num_sequences, length) int64, labels -100 outside the answers and not shifted.

    Raises:
        UserError: as `FormBuilder.build`.
    """
    items = [builder.build(generator, length) for _ in range(num_sequences)]
    ids = np.stack([item.ids for item in items])
    labels = np.where(np.stack([item.question for item in items]) >= 0, ids, IGNORED)
    return torch.from_numpy(ids), torch.from_numpy(labels)
