"""Haystacks (repeated noise, or sentences of local text), and random keys and values of needles."""

import re
import uuid
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from statex.data.documents import open_documents
from statex.data.tokenizer import encode_continuation
from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.records import digest
from statex.evaluation.text.tokens import tokenizer_digest
from statex.settings import TextSource

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LONGEST_SENTENCE = 20
"""In words; longer ones (tables, code) are split, so that a needle can be inserted at any depth."""
ROUNDS = 4
"""The text read is this many times the length of a context, so that items can begin at different places."""

ADJECTIVES = """
able amber ancient azure bold brave brief bright broad bronze calm candid careful chilly clever cloudy cold cosmic
crisp curious daring deep eager early faint fancy fierce fluffy gentle giant golden grand happy hasty hidden humble
icy jolly keen kind late lively lofty lucky mellow mighty modest narrow neat noble odd pale patient plain polite
proud quick quiet rapid rare royal rustic shy silent silver simple sleepy smooth solid steady stormy sturdy subtle
sunny swift tender tidy tiny vast vivid warm wild wise witty young zesty
"""
NOUNS = """
acorn anchor apple arrow badge basket beacon bell bird boat book bottle bridge brook bucket button cabin camera
candle canyon carpet castle cave chair cliff clock cloud coin comet compass copper coral cradle crown desert door
dragon drum eagle engine falcon feather fern fiddle field flame flute forest fossil fountain fox garden glacier
glove hammer harbor hat hill island jacket jewel kettle key kite ladder lake lamp lantern leaf lemon letter lion
maple marble meadow mirror moon mountain needle ocean olive orchard otter owl paddle palace panda pearl pebble
pepper piano pilot planet pocket pond quartz rabbit raven ribbon river robin rocket saddle sail shell shield spider
spoon star stone storm table temple thunder tiger tower train tunnel valley velvet village violin wagon walnut whale
willow window wolf
"""


def random_word(generator: np.random.Generator) -> str:
    return f"{generator.choice(ADJECTIVES.split())}-{generator.choice(NOUNS.split())}"


def random_number(generator: np.random.Generator) -> str:
    """Seven digits, the first of them not 0."""
    return str(generator.integers(10**6, 10**7))


def random_uuid(generator: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=generator.bytes(16), version=4))


@dataclass(frozen=True)
class Haystack:
    """Sentences in order, with their numbers of tokens.

    Args:
        sentences: of text, or one line of noise that is repeated.
        counts: (len(sentences),) tokens of each, including the separator.
        separator: the text between two sentences.
        repeats: whether the sentences begin again when they are used up.
    """

    sentences: list[str]
    counts: np.ndarray
    separator: str
    repeats: bool

    def take(self, generator: np.random.Generator, num_tokens: int) -> list[str]:
        """Consecutive sentences of about `num_tokens` tokens, from a random place; the last one of a text may be cut.

        Raises:
            UserError: the text is shorter than that.
        """
        if self.repeats:
            return self.sentences * (num_tokens // int(self.counts[0]))
        ends, total = np.cumsum(self.counts), int(self.counts.sum())
        if not self.holds(num_tokens):
            raise UserError(
                "evaluation.text",
                f"{total} tokens",
                f"is too short a haystack for {num_tokens} tokens",
                "give more text or ask for shorter lengths",
            )
        last = int(np.searchsorted(ends, total - num_tokens, side="right"))
        start = int(generator.integers(min(last, len(ends) - 1) + 1))
        before = ends[start - 1] if start else 0
        end = min(int(np.searchsorted(ends, before + num_tokens, side="left")) + 1, len(ends))
        return self.shorten(self.sentences[start:end], int(ends[end - 1] - before) - num_tokens)

    def shorten(self, sentences: list[str], num_tokens: int) -> list[str]:
        """Sentences with about `num_tokens` tokens dropped from the end, at least one word (of noise: one sentence)."""
        if self.repeats:
            return sentences[: -max(1, num_tokens // int(self.counts[0]))]
        kept = list(sentences)
        drop = max(1, round(num_tokens / self.tokens_per_word))
        while drop and kept:
            words = kept.pop().split(" ")
            if len(words) > drop:
                kept.append(" ".join(words[:-drop]))
            drop -= min(drop, len(words))
        return kept

    def holds(self, num_tokens: int) -> bool:
        """Whether there are `num_tokens` tokens, and any at all."""
        return self.repeats or int(self.counts.sum()) >= max(num_tokens, 1)

    @cached_property
    def tokens_per_word(self) -> float:
        return float(self.counts.sum()) / sum(sentence.count(" ") + 1 for sentence in self.sentences)


def noise_haystack(context: Context, num_tokens: int) -> Haystack:
    """Repeated noise, for any number of tokens."""
    count = len(encode_continuation(context.tokenizer, NOISE, f"\n{NOISE}"))
    return Haystack([NOISE], np.array([count]), "\n", repeats=True)


_texts: dict[str, Haystack] = {}


def text_haystack(context: Context, num_tokens: int) -> Haystack:
    """Sentences of the held-out text, enough for contexts of `num_tokens` tokens to begin at different places.

    Where an item begins depends on how much text there is to choose from, so each length has its own text, whatever was
    measured before in this process or another.
    """
    tokenizer, source = context.tokenizer, context.text
    key = digest(source.model_dump_json(), tokenizer_digest(tokenizer), str(num_tokens))
    if key not in _texts:
        _texts[key] = _read_haystack(tokenizer, source, ROUNDS * num_tokens)
    return _texts[key]


def _read_haystack(tokenizer: Any, source: TextSource, num_tokens: int) -> Haystack:
    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    sentences: list[str] = []
    counts: list[int] = []
    total, (before,) = 0, encode(["."])
    for document in open_documents(source, part="held_out", field="evaluation.text"):
        new = split_sentences(document["text"])
        if not new:
            continue
        sentences += new
        # Encoded after another sentence, where no tokenizer adds a space
        counts += [len(ids) - len(before) for ids in encode([f". {sentence}" for sentence in new])]
        total += sum(counts[-len(new) :])
        if total >= num_tokens:
            break
    return Haystack(sentences, np.array(counts, dtype=np.int64), " ", repeats=False)


def split_sentences(text: str) -> list[str]:
    """Sentences with whitespace normalised; a long one is split every LONGEST_SENTENCE words."""
    pieces = []
    for sentence in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()):
        words = sentence.split(" ")
        pieces += [
            " ".join(words[start : start + LONGEST_SENTENCE]) for start in range(0, len(words), LONGEST_SENTENCE)
        ]
    return [piece for piece in pieces if piece]
