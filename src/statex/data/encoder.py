"""Documents as tokens, each with the end-of-text token behind it."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from statex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenised in one call: enough to keep the tokenizer's threads busy, few enough to start at once
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 200_000


class DocumentEncoder:
    """Turns documents {"text"} into token documents, (T,) int64, each with the end-of-text token behind it.

    Text that spells out a special token is encoded as ordinary text.

    Raises:
        UserError: the tokenizer has no end-of-text token or is not from the tokenizers library.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        from tokenizers import Tokenizer

        if tokenizer.eos_token_id is None:
            problem = "has no eos_token to stand between documents"
            raise UserError("tokenizer", tokenizer.name_or_path, problem, "set tokenizer.eos_token")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            problem = "is not a fast tokenizer (a tokenizer.json of the tokenizers library)"
            raise UserError("tokenizer", tokenizer.name_or_path, problem, "convert it to a fast one")
        self.end = tokenizer.eos_token_id
        # A copy, because these settings would change the caller's tokenizer
        self.backend = Tokenizer.from_str(backend.to_str())
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, documents: Iterable[dict[str, Any]]) -> Iterator[np.ndarray]:
        texts: list[str] = []
        num_characters = 0
        for document in documents:
            texts.append(document["text"])
            num_characters += len(texts[-1])
            if len(texts) >= BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
                yield from self._encode(texts)
                texts, num_characters = [], 0
        yield from self._encode(texts)

    def _encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        # encode_batch_fast leaves out the offsets into the text: twice as fast
        for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array([*encoding.ids, self.end], dtype=np.int64)
