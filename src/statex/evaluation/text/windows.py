"""Windows of held-out documents, and the NLL of their tokens."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from statex.data.documents import open_documents
from statex.errors import UserError
from statex.evaluation.context import Context
from statex.evaluation.records import digest
from statex.evaluation.suite import Cell
from statex.evaluation.text.tokens import tokenize, tokenizer_digest
from statex.settings import MOST_TOKENS, Section, TextSource

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = {"cpu": 1024, "cuda": 8192}
"""Tokens of a scored document, where neither the recipe nor the training length sets it."""
CHARACTERS_PER_TOKEN = 12
"""More than real text has, so that only the beginning of a long document need be tokenised."""
FEW_DOCUMENTS = 20
"""A default length is halved until this many documents are long enough; a requested length never is."""


class WindowSettings(Section):
    length: int | None = Field(
        default=None, ge=2, le=MOST_TOKENS, description="tokens of a window of a document that is scored"
    )
    num_windows: int = Field(
        default=100, ge=1, le=10**6, description="one from each document that is long enough, then second ones, ..."
    )


@dataclass(frozen=True)
class Window:
    """T + 1 consecutive tokens of a held-out document, (T + 1,), with the names of the window and the document."""

    name: str
    document: str
    ids: np.ndarray


def held_out_windows(context: Context, suite: str, settings: WindowSettings, default: int | None) -> list[Window]:
    """Windows of T + 1 tokens of held-out documents: the first ones of all documents, then the second ones, ...

    Args:
        suite: the recipe key of `settings`.
        default: T where the recipe gives none; None: what the device allows.

    Raises:
        UserError: no document is long enough, or the model cannot read that many tokens.
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
            "no held-out document has that many tokens",
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


def window_cells(context: Context) -> list[Cell]:
    """All windows as one cell."""
    return [Cell("windows")]


def scored_windows(context: Context, windows: list[Window]) -> Iterator[tuple[Window, np.ndarray]]:
    """Each window with the (T,) NLL of its tokens after the first."""
    import torch

    size = context.evaluation.batch_size
    for part in (windows[start : start + size] for start in range(0, len(windows), size)):
        ids = torch.from_numpy(np.stack([window.ids for window in part]))
        yield from zip(part, context.reader.next_token_nll(ids).numpy(), strict=True)
