"""Held-out documents as tokens, and the frozen table of the training text's n-grams."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statex.data.documents import open_documents
from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.records import digest
from statex.recipe import ArHitsSuite, TextSource, TextSuite

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = {"cpu": 1024, "cuda": 8192}
"""Tokens of a scored document where neither the recipe nor the training length says."""
CHARACTERS_PER_TOKEN = 12
"""More than text has, so that only the beginning of a long document need be tokenised."""
FEW_DOCUMENTS = 20
"""A default length is halved until so many documents reach it; a length that was asked for never is."""


@dataclass(frozen=True)
class Window:
    """T + 1 tokens in a row of a held-out document, (T + 1,), with the document's name and the window's own."""

    name: str
    document: str
    ids: np.ndarray


@dataclass(frozen=True)
class CountTable:
    """How often each n-gram occurs in a text.

    Args:
        ngrams: (m,) sorted, as `ngram_keys` gives them.
        counts: (m,).
        vocab_size: V.
        ngram: n.
        num_tokens: of the text that was counted.
    """

    ngrams: np.ndarray
    counts: np.ndarray
    vocab_size: int
    ngram: int
    num_tokens: int

    @cached_property
    def digest(self) -> str:
        return digest(self.ngrams, self.counts)

    def lookup(self, ngrams: np.ndarray) -> np.ndarray:
        """The counts of some n-grams, 0 where the text has none."""
        if len(self.ngrams) == 0:
            return np.zeros(len(ngrams), dtype=np.int64)
        places = np.minimum(np.searchsorted(self.ngrams, ngrams), len(self.ngrams) - 1)
        return np.where(self.ngrams[places] == ngrams, self.counts[places], 0)


def ngram_keys(ids: np.ndarray, ngram: int, vocab_size: int) -> np.ndarray:
    """(T - n + 1,) one number for each n tokens in a row of (T,), equal only for equal ones.

    Raises:
        UserError: so many tokens of this vocabulary do not fit a number of 64 bits.
    """
    if vocab_size**ngram > 2**63:
        raise UserError(
            "evaluation.ar_hits.ngram", ngram, f"is too many tokens of a vocabulary of {vocab_size}", "use 2 or 3"
        )
    length = len(ids) - ngram + 1
    keys = np.zeros(max(length, 0), dtype=np.int64)
    for place in range(ngram if length > 0 else 0):
        keys = keys * vocab_size + ids[place : place + length]
    return keys


def tokenize(tokenizer: Any, text: str) -> np.ndarray:
    """The tokens of a text, without any special ones."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def held_out_windows(context: Context, suite: str, settings: TextSuite, default: int | None) -> list[Window]:
    """Windows of T + 1 tokens of held-out documents: the first ones of all documents, then the second ones, ...

    Args:
        suite: the recipe key of `settings`.
        default: T where the recipe gives none, None for what the device allows.

    Raises:
        UserError: no document is long enough, or the model cannot read so many tokens.
    """
    length = settings.length or default or DEFAULT_LENGTH.get(context.reader.device.type, DEFAULT_LENGTH["cuda"])
    if settings.length is None and context.limit is not None:
        length = min(length, context.limit)
    context.check_length(f"evaluation.{suite}.length", length)
    tokenizer = context.require_tokenizer(suite)
    windows = _windows_of(tokenizer, context.text, length, settings.num_windows)
    while settings.length is None and len({window.document for window in windows}) < FEW_DOCUMENTS and length > 64:
        length //= 2
        windows = _windows_of(tokenizer, context.text, length, settings.num_windows)
    logger.info("%s: %d windows of %d tokens", suite, len(windows), length)
    if not windows:
        raise UserError(
            f"evaluation.{suite}.length",
            length,
            "no held-out document has so many tokens",
            "ask for a shorter length or give a text with longer documents",
        )
    return windows


_windows: dict[str, list[Window]] = {}


def _windows_of(tokenizer: Any, source: TextSource, length: int, count: int) -> list[Window]:
    """As `_read_windows`, once for all models of a process."""
    key = digest(source.model_dump_json(), tokenizer_digest(tokenizer), f"{length} {count}")
    if key not in _windows:
        _windows[key] = _read_windows(tokenizer, source, length, count)
    return _windows[key]


def _read_windows(tokenizer: Any, source: TextSource, length: int, count: int) -> list[Window]:
    """The first windows only, where there are enough of them; else every document is tokenised whole."""
    first = []
    for document in open_documents(source, part="held_out", field="evaluation.text"):
        ids = tokenize(tokenizer, document["text"][: (length + 1) * CHARACTERS_PER_TOKEN])
        if len(ids) > length:
            first.append(Window(f"{document['id']}:0", document["id"], ids[: length + 1]))
        if len(first) == count:
            return first
    if not first:
        return []
    ranked = []
    for order, document in enumerate(open_documents(source, part="held_out", field="evaluation.text")):
        ids = tokenize(tokenizer, document["text"])
        for number in range((len(ids) - 1) // length):
            start = number * length
            window = Window(f"{document['id']}:{start}", document["id"], ids[start : start + length + 1])
            ranked.append((number, order, window))
    ranked.sort(key=lambda entry: entry[:2])
    return [window for _, _, window in ranked[:count]]


def scored_windows(context: Context, windows: list[Window]) -> Iterator[tuple[Window, np.ndarray]]:
    """Each window with the (T,) NLL of its tokens after the first."""
    size = context.evaluation.batch_size
    for part in (windows[start : start + size] for start in range(0, len(windows), size)):
        ids = torch.from_numpy(np.stack([window.ids for window in part]))
        yield from zip(part, context.reader.next_token_nll(ids).numpy(), strict=True)


def default_ngram(vocab_size: int) -> int:
    """How many tokens are about as telling as a bigram of words: with few tokens almost all bigrams are common."""
    return 2 if vocab_size >= 16_384 else 3 if vocab_size >= 2048 else 4


def count_ngrams(tokenizer: Any, source: TextSource, ngram: int, max_tokens: int, vocab_size: int) -> CountTable:
    """Count the n-grams of a source's training part, in a fixed shuffled order up to `max_tokens` tokens."""
    parts, total = [np.zeros(0, np.int64)], 0
    for document in open_documents(source, shuffle_seed=0, field="evaluation.text"):
        ids = tokenize(tokenizer, document["text"])[: max_tokens - total]
        parts.append(ngram_keys(ids, ngram, vocab_size))
        total += len(ids)
        if total >= max_tokens:
            break
    ngrams, counts = np.unique(np.concatenate(parts), return_counts=True)
    return CountTable(ngrams, counts, vocab_size, ngram, total)


_tables: dict[str, CountTable] = {}


def count_table(context: Context, settings: ArHitsSuite) -> CountTable:
    """The count table of this context's `count_text`; counted once a process, and kept in `shared`."""
    tokenizer = context.require_tokenizer("ar_hits")
    vocab_size = context.reader.vocab_size
    ngram = settings.ngram or default_ngram(vocab_size)
    source = context.count_text.model_dump_json()
    key = digest(source, tokenizer_digest(tokenizer), str((vocab_size, ngram, settings.count_tokens)))
    if key not in _tables:
        path = context.shared / f"ngrams-{key}.npz" if context.shared is not None else None
        if path is not None and path.exists():
            _tables[key] = _load_table(path)
        else:
            _tables[key] = count_ngrams(tokenizer, context.count_text, ngram, settings.count_tokens, vocab_size)
            if path is not None:
                _save_table(path, _tables[key])
    return _tables[key]


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash that two tokenizers share only if they split a sample of text alike."""
    sample = "The quick brown fox, 0123456789; def f(x): return x ** 2  # Übung\n\t" * 2
    return digest(tokenize(tokenizer, sample), str(len(tokenizer)), "".join(sorted(tokenizer.get_vocab())))


NUMBERS = ("vocab_size", "ngram", "num_tokens")


def _load_table(path: Path) -> CountTable:
    with np.load(path, allow_pickle=False) as data:
        return CountTable(data["ngrams"], data["counts"], *(int(data[name]) for name in NUMBERS))


def _save_table(path: Path, table: CountTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")  # several processes may write it at once
    np.savez(temporary, ngrams=table.ngrams, counts=table.counts, **{name: getattr(table, name) for name in NUMBERS})
    temporary.replace(path)
