"""The training text of a recipe as tokens, prepared once: memory-mapped files that training reads by position.

A folder of prepared tokens, named by everything that its tokens depend on (`tokens_key`):
    index.json         its files with their sizes and hashes, and whether they hold the whole text
    <number>.tokens    token documents end to end, 16 or 32 bits per token
    <number>.ends      where each document ends, counted from the beginning of that file, 64 bits

Documents are in the shuffled order of `data.seed`. A file is written under another name and renamed, the index after
it, so that an interrupted preparation resumes after the last complete file. Where the text itself
fails, because the hub is gone, what is tokenised so far is written first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from statex.data.documents import files_of, open_documents
from statex.data.encoder import DocumentEncoder
from statex.errors import UserError
from statex.settings import Data
from statex.utils.atomic import locked, name_full_disk, write_text_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
TOKENS_PER_FILE = 2**25
WINDOW = 2**26
"""Training shuffles sequences within windows of this many tokens; text is prepared a window at a time."""
INDEX = "index.json"

Progress = Callable[[int, int], None]
"""Called with the tokens prepared and those needed."""


def tokens_key(data: Data, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A name for the tokens of a text; it changes with the text, tokenizer, held-out share, handling of bad records and
    `data.seed`.

    Files are identified by path, size and modification time; hub data by name and `hub_revision`, because the hub's
    present contents cannot be checked without a network.
    """
    encoder = DocumentEncoder(tokenizer)
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(data.text, "data.text")]
    text = data.text.model_dump(mode="json", exclude_none=True)
    determines = [FORMAT, text, stats, encoder.backend.to_str(), encoder.end, data.seed, data.shuffle_buffer]
    return hashlib.blake2b(json.dumps(determines).encode("utf-8"), digest_size=10).hexdigest()


def prepare_tokens(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    parent: Path,
    needed: int,
    *,
    progress: Progress | None = None,
    verify: bool = True,
) -> "TokenFolder":
    """Tokenise the training text as far as it is needed, unless that is done; resume where an earlier call stopped.

    The tokenizer's own threads use the whole machine; other processes that want the same tokens wait.

    Args:
        data: section of a recipe.
        parent: folder of folders of prepared tokens.
        needed: how many tokens, from `whole_windows`, so that the order of sequences does not depend on their number.
        progress: called after each batch of documents.
        verify: compare existing files with their hashes; else only with their sizes.

    Raises:
        UserError: the text cannot be read, a file of prepared tokens is damaged, or the folder cannot be written to.
    """
    folder = parent / tokens_key(data, tokenizer)
    with name_full_disk(folder), locked(folder, "data.tokens", wait=True):
        if (folder / INDEX).exists():
            prepared = TokenFolder(folder, verify=verify)
            if prepared.has(needed):
                return prepared
        _prepare(folder, data, tokenizer, needed, progress or (lambda *_: None))
    return TokenFolder(folder, verify=False)


def are_prepared(data: Data, tokenizer: "PreTrainedTokenizerBase", parent: Path, needed: int) -> bool:
    """Whether `prepare_tokens` would find all that is needed."""
    folder = parent / tokens_key(data, tokenizer)
    return (folder / INDEX).exists() and TokenFolder(folder, verify=False).has(needed)


def check_text(data: Data, tokenizer: "PreTrainedTokenizerBase", length: int) -> None:
    """Raise UserError where the text cannot be read or is shorter than one sequence; reads no more than that."""
    total = 0
    for ids in DocumentEncoder(tokenizer)(open_documents(data.text)):
        total += len(ids)
        if total >= length:
            return
    raise _too_short(length, total)


def _too_short(length: int, total: int) -> UserError:
    problem = f"is longer than the whole training text, {total} tokens"
    return UserError("training.sequence_length", length, problem, "shorten it or give more text in data.text")


class TokenFolder:
    """Prepared tokens, read by position.

    Args:
        folder: as `prepare_tokens` leaves it.
        verify: compare the files with their hashes; else only with their sizes.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, *, verify: bool):
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.dtype = np.dtype(index["dtype"])
            self.is_whole: bool = index["is_whole"]
            self.files: list[dict[str, Any]] = index["files"]
            self.starts = np.cumsum([0, *(file["tokens"] for file in self.files)])
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(folder / INDEX, str(error)) from error
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            for _ in pool.map(partial(self._check, verify=verify), self._stored()):
                pass

    def __getstate__(self) -> dict[str, Any]:
        """Without the memory maps, which each process opens for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_ends")}

    def _check(self, stored: tuple[str, int, str], *, verify: bool) -> None:
        """Raise UserError where a file is not what was written."""
        name, size, digest = stored
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise _damaged(path, f"it should have {size} bytes")
        if verify and _digest(path.read_bytes()) != digest:
            raise _damaged(path, "its content is not what was written")

    def _stored(self) -> Iterator[tuple[str, int, str]]:
        for number, file in enumerate(self.files):
            yield f"{number:05}.tokens", self.dtype.itemsize * file["tokens"], file["tokens_digest"]
            yield f"{number:05}.ends", 8 * file["documents"], file["ends_digest"]

    @property
    def num_tokens(self) -> int:
        """Tokens prepared."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Documents prepared."""
        return sum(file["documents"] for file in self.files)

    def has(self, needed: int) -> bool:
        """Whether that many tokens, or the whole text, are prepared."""
        return self.is_whole or self.num_tokens >= needed

    @cached_property
    def _tokens(self) -> list[np.memmap]:
        return [np.memmap(self.folder / f"{number:05}.tokens", self.dtype, "r") for number in range(len(self.files))]

    @cached_property
    def _ends(self) -> list[np.memmap]:
        return [np.memmap(self.folder / f"{number:05}.ends", np.uint64, "r") for number in range(len(self.files))]

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens from `start` on, (length,) int64, and the document that each belongs to, (length,) int32 from 0."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces, borders, position = [], [], start
        for number in range(first, len(self.files)):
            begin = position - int(self.starts[number])
            piece = self._tokens[number][begin : begin + start + length - position]
            ends = self._ends[number]
            inside = ends[np.searchsorted(ends, begin, "right") : np.searchsorted(ends, begin + len(piece), "right")]
            borders.append(inside.astype(np.int64) + int(self.starts[number]) - start)
            pieces.append(piece.astype(np.int64))
            position += len(piece)
            if position == start + length:
                break
        seq_idx = np.zeros(length, dtype=np.int32)
        inner = np.concatenate(borders)
        seq_idx[inner[inner < length]] = 1
        return np.concatenate(pieces), seq_idx.cumsum(dtype=np.int32)


class TextOrder:
    """The order in which training reads the sequences of the text: each epoch and each seed has its own.

    Sequences are permuted within windows of 2**26 tokens; a remainder of an epoch that is shorter than a sequence is
    left out. The order does not depend on the number of tokens prepared.

    Args:
        tokens: the prepared tokens.
        length: tokens of a sequence.
        seed: of the order.

    Raises:
        UserError: the whole text is shorter than one sequence.
    """

    def __init__(self, tokens: TokenFolder, length: int, seed: int):
        self.tokens, self.length, self.seed = tokens, length, seed
        self.per_window = _per_window(length)
        self.per_epoch = tokens.num_tokens // length if tokens.is_whole else None
        if self.per_epoch == 0:
            raise _too_short(length, tokens.num_tokens)
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and documents of the sequence at an index, from 0 without end."""
        epoch, index = divmod(index, self.per_epoch) if self.per_epoch is not None else (0, index)
        window, index = divmod(index, self.per_window)
        first = window * self.per_window
        return self.tokens.read((first + int(self._order(epoch, window)[index])) * self.length, self.length)

    def _order(self, epoch: int, window: int) -> np.ndarray:
        if self._last is None or self._last[0] != (epoch, window):
            size = self.per_window
            if self.per_epoch is not None:
                size = min(size, self.per_epoch - window * size)
            order = np.random.default_rng([self.seed, ORDER_STREAM, epoch, window]).permutation(size)
            self._last = (epoch, window), order
        return self._last[1]


ORDER_STREAM = 2
"""The random stream of a seed that orders text, distinct from those of `mixture`."""


def whole_windows(read: int, length: int) -> int:
    """Tokens of all windows that the first `read` tokens lie in, where sequences of `length` tokens are read."""
    of_window = _per_window(length) * length
    return -(-read // of_window) * of_window


def _per_window(length: int) -> int:
    """Sequences of a window."""
    return max(1, WINDOW // length)


def _prepare(folder: Path, data: Data, tokenizer: "PreTrainedTokenizerBase", needed: int, progress: Progress) -> None:
    """Add files until there are enough tokens or no text is left; also where the text fails, of what comes before."""
    encoder = DocumentEncoder(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "format": FORMAT,
        # By the largest id: a vocabulary with gaps has larger ones than it has tokens
        "dtype": "uint16" if max(encoder.backend.get_vocab().values()) < 2**16 else "uint32",
        "text": data.text.identity(),
        "is_whole": False,
        "files": [],
    }
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    files = index["files"]
    done = sum(file["tokens"] for file in files)
    documents = open_documents(data.text, shuffle_seed=data.seed, shuffle_buffer=data.shuffle_buffer)
    rest = islice(documents, sum(file["documents"] for file in files), None)
    held: list[np.ndarray] = []
    size = 0

    def write(is_whole: bool) -> None:
        if held:
            files.append(_write_file(folder, len(files), held))
        write_text_atomic(folder / INDEX, json.dumps(index | {"is_whole": is_whole}))

    try:
        for ids in encoder(rest):
            held.append(ids.astype(index["dtype"]))
            size += len(ids)
            progress(min(done + size, needed), needed)
            if size >= TOKENS_PER_FILE:
                write(is_whole=False)
                done, held, size = done + size, [], 0
                if done >= needed:
                    break
        else:
            write(is_whole=True)
    except UserError:
        write(is_whole=False)
        raise
    progress(needed, needed)


def _write_file(folder: Path, number: int, documents: list[np.ndarray]) -> dict[str, Any]:
    """Write token documents; returns their entry in the index."""
    tokens = np.concatenate(documents)
    ends = np.cumsum([len(document) for document in documents], dtype=np.uint64)
    for name, array in (("tokens", tokens), ("ends", ends)):
        temporary = folder / f".{number:05}.{name}.tmp"
        temporary.write_bytes(array.tobytes())
        os.replace(temporary, folder / f"{number:05}.{name}")
    return {
        "tokens": len(tokens),
        "documents": len(documents),
        "tokens_digest": _digest(tokens.tobytes()),
        "ends_digest": _digest(ends.tobytes()),
    }


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _damaged(path: Path, problem: str) -> UserError:
    remedy = f"remove {path.parent}; its tokens will be prepared again"
    return UserError("data.tokens", str(path), f"prepared tokens are missing or damaged ({problem})", remedy)
