"""The frozen table of the training text's n-grams, counted once for all models."""

import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from statex.data.documents import open_documents
from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.records import digest
from statex.evaluation.text.tokens import tokenize, tokenizer_digest
from statex.settings import TextSource


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
        """The counts of some n-grams, 0 for those that the text lacks."""
        if len(self.ngrams) == 0:
            return np.zeros(len(ngrams), dtype=np.int64)
        places = np.minimum(np.searchsorted(self.ngrams, ngrams), len(self.ngrams) - 1)
        return np.where(self.ngrams[places] == ngrams, self.counts[places], 0)


def ngram_keys(ids: np.ndarray, ngram: int, vocab_size: int) -> np.ndarray:
    """(T - n + 1,) one number for each n consecutive tokens of (T,), unique to them.

    Raises:
        UserError: an n-gram of this vocabulary does not fit into 64 bits.
    """
    if vocab_size**ngram > 2**63:
        raise UserError(
            "evaluation.ar_hits.ngram", ngram, f"is too long for a vocabulary of {vocab_size}", "use 2 or 3"
        )
    length = len(ids) - ngram + 1
    keys = np.zeros(max(length, 0), dtype=np.int64)
    for place in range(ngram if length > 0 else 0):
        keys = keys * vocab_size + ids[place : place + length]
    return keys


def default_ngram(vocab_size: int) -> int:
    """The n at which an n-gram is about as informative as two words: with a small vocabulary bigrams are common."""
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


def count_table(context: Context, ngram: int | None, count_tokens: int) -> CountTable:
    """The count table of this context's `count_text`; counted once per process, and saved in `shared`."""
    tokenizer = context.require_tokenizer("ar_hits")
    vocab_size = context.reader.vocab_size
    ngram = ngram or default_ngram(vocab_size)
    source = context.count_text.model_dump_json()
    key = digest(source, tokenizer_digest(tokenizer), str((vocab_size, ngram, count_tokens)))
    if key not in _tables:
        path = context.shared / f"ngrams-{key}.npz" if context.shared is not None else None
        if path is not None and path.exists():
            _tables[key] = _load_table(path)
        else:
            _tables[key] = count_ngrams(tokenizer, context.count_text, ngram, count_tokens, vocab_size)
            if path is not None:
                _save_table(path, _tables[key])
    return _tables[key]


def _load_table(path: Path) -> CountTable:
    with np.load(path, allow_pickle=False) as data:
        values: dict[str, Any] = {name: value if value.ndim else int(value) for name, value in data.items()}
    return CountTable(**values)


def _save_table(path: Path, table: CountTable) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")  # several processes may write it at once
    np.savez(temporary, **asdict(table))
    temporary.replace(path)
