"""Documents to sequences of a fixed length: tokenise, join with an end-of-text token, cut; no token is lost."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from statex.data.documents import open_documents
from statex.errors import UserError
from statex.settings import Data

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

# Tokenised at one go: enough to keep the tokenizer's threads busy, little enough to begin at once
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 200_000


class Packed(NamedTuple):
    """One sequence: token ids, (T,) int64, and the document that each token belongs to, (T,) int32 from 0."""

    input_ids: np.ndarray
    seq_idx: np.ndarray


def text_sequences(
    data: Data, tokenizer: "PreTrainedTokenizerBase", length: int, *, start: int = 0
) -> Iterator[Packed]:
    """The packed training text of a recipe, epoch after epoch without end, each in an order of its own.

    Everything follows from `data`: the sequence number `start` is found again by reading and tokenising the text
    before it, but never more than one epoch of it twice.

    Raises:
        UserError: the text cannot be read, or an epoch of it is shorter than one sequence.
    """
    documents = open_documents(data.text, shuffle_seed=data.seed, shuffle_buffer=data.shuffle_buffer)
    yield from pack(_endless_documents(documents, tokenizer, length, skip=start * length), length)


def check_text(data: Data, tokenizer: "PreTrainedTokenizerBase", length: int) -> None:
    """Raise what `text_sequences` would, without reading more of the text than one sequence takes."""
    next(pack(_endless_documents(open_documents(data.text), tokenizer, length, skip=0), length))


def _endless_documents(
    documents: "datasets.IterableDataset", tokenizer: "PreTrainedTokenizerBase", length: int, skip: int
) -> Iterator[np.ndarray]:
    """Token documents of all epochs, without the first `skip` tokens."""
    encode = DocumentEncoder(tokenizer)
    epoch = 0
    while True:
        documents.set_epoch(epoch)
        total = 0
        for ids in encode(documents):
            total += len(ids)
            if skip < len(ids):
                yield ids[skip:]
                skip = 0
            else:
                skip -= len(ids)
        if total < length:
            problem = f"is longer than the whole training text, {total} tokens"
            raise UserError("training.sequence_length", length, problem, "shorten it or give more text in data.text")
        # Every epoch has the same documents, so as many tokens: whole epochs need not be read to be skipped
        epoch += 1 + skip // total
        skip %= total


def pack(documents: Iterable[np.ndarray], length: int) -> Iterator[Packed]:
    """Join token documents and cut them into sequences of `length` tokens; a last, shorter rest is not given out.

    A document that does not fit goes on in the next sequence, where it is document 0.
    """
    ids: list[np.ndarray] = []
    sizes: list[int] = []
    room = length
    for document in documents:
        while len(document):
            piece, document = document[:room], document[room:]
            ids.append(piece)
            sizes.append(len(piece))
            room -= len(piece)
            if room == 0:
                yield Packed(np.concatenate(ids), np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
                ids, sizes, room = [], [], length


class DocumentEncoder:
    """Turns documents {"text"} into token documents, (T,) int64, each with the end-of-text token behind it.

    Text that spells a special token is encoded as the ordinary text it is.

    Raises:
        UserError: the tokenizer has no end-of-text token or is none of the tokenizers library.
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
        # A copy, for these settings would change what the caller's tokenizer does
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
