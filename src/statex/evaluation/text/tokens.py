"""Text as tokens."""

from typing import Any

import numpy as np

from statex.evaluation.records import digest


def tokenize(tokenizer: Any, text: str) -> np.ndarray:
    """The tokens of a text, without special tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and of how it splits a sample of text."""
    sample = "The quick brown fox, 0123456789; def f(x): return x ** 2  # Übung\n\t" * 2
    return digest(tokenize(tokenizer, sample), str(len(tokenizer)), "".join(sorted(tokenizer.get_vocab())))
