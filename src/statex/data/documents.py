"""Where text comes from: one stream of {"id", "text"} documents, whatever the source.

`datasets` does the reading, streaming and shuffling; it is imported inside the functions, as that takes seconds.
"""

import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from statex.data.files import BYTE_ORDER_MARK, format_of, no_column, read_records, text_problem
from statex.errors import UserError, explained
from statex.settings import TextSource
from statex.utils.hub import limit_waiting

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

Part = Literal["training", "held_out", "all"]

# Folders of the standard library that are not library code: installed packages, tests, and tables of data
SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)


def open_documents(
    source: TextSource,
    *,
    part: Part = "training",
    shuffle_seed: int | None = None,
    shuffle_buffer: int = 1000,
    field: str = "data.text",
) -> "Documents":
    """A stream of documents {"id": str, "text": str}; documents without text are left out.

    The id of a file of plain text is its path below the folder that all files of the source share; the id of a record
    of any other file, or of hub data, is a hash of its text. A byte order mark is not part of the text. The held-out
    share is chosen by a hash of the text, so it is the same on every machine, in every order, and a document that
    occurs twice is never in both parts.

    Args:
        source: the recipe's text source.
        part: "training" and "held_out" share the documents between them; "all" is both.
        shuffle_seed: shuffle the files and, in a moving buffer, the documents; `set_epoch(e)` on the result gives
            another order to each epoch. None keeps the order of the source.
        shuffle_buffer: documents in the buffer that shuffling draws from.
        field: the recipe's name of the source, for errors.

    Raises:
        UserError: no file matches, a file's ending is not known, a file or the hub cannot be read, the column is
            missing, the part has no document, or, where `source.bad_records` is "error", a record cannot be read.
            Errors late in a source, also of a hub that fails midway, are raised when they are reached.
    """
    stream = _read(source, field)
    if part != "all":
        stream = stream.filter(_is_in_part, fn_kwargs={"part": part, "held_out": source.held_out})
    if next(iter(Documents(stream, source, field)), None) is None:
        value = source.hub or source.files or "standard_library"
        if part == "held_out":
            remedy = f"give more documents or raise {field}.held_out (now {source.held_out})"
        else:
            remedy = "give a source with text"
        raise UserError(field, value, f'has no text in its part "{part}"', remedy)
    if shuffle_seed is not None:
        # One shard at a time: reading several takes threads, which `datasets` lets sleep 5 s at each end of parquet
        stream = stream.shuffle(seed=shuffle_seed, buffer_size=shuffle_buffer, max_buffer_input_shards=1)
    return Documents(stream, source, field)


class Documents:
    """A stream of documents, which names the data set where the hub fails midway.

    `datasets` has then tried again for minutes, by its own settings.
    """

    def __init__(self, stream: "datasets.IterableDataset", source: TextSource, field: str):
        self.stream, self.source, self.field = stream, source, field

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch, where documents are shuffled."""
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, str]]:
        if self.source.hub is None:
            yield from self.stream
            return
        documents = iter(self.stream)
        problem = "can no longer be read from the hub"
        remedy = "check the network; the same command resumes and keeps the tokens that are prepared"
        while True:
            with explained(f"{self.field}.hub", self.source.hub, problem, remedy):
                document = next(documents, None)
            if document is None:
                return
            yield document


def _read(source: TextSource, field: str) -> "datasets.IterableDataset":
    """All documents with text, of whichever source."""
    if source.hub is not None:
        stream = _open_hub(source, field)
    else:
        paths = files_of(source, field)
        library = Path(sysconfig.get_path("stdlib"))
        root = library if source.standard_library else Path(os.path.commonpath([path.parent for path in paths]))
        stream = _stream_of_files(paths, root, source, field)
    return stream.filter(_has_text)


def standard_library_files() -> list[Path]:
    """The Python files of the running interpreter's standard library, sorted: about 600 files and 10 MB.

    Without installed packages, tests, the character tables of `encodings`, `pydoc_data`, and the build's own
    `_sysconfigdata`, which differs between machines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfig")]
    return sorted(files)


def files_of(source: TextSource, field: str) -> list[Path]:
    """The files that a source names, in the order in which they are read; none for hub data.

    Raises:
        UserError: no file matches, all are empty, or the ending of one is not known.
    """
    if source.hub is not None:
        return []
    if source.standard_library:
        return standard_library_files()
    paths = list(dict.fromkeys(path for pattern in source.files or [] for path in _matches(pattern, field)))
    for path in paths:
        format_of(path, source.format, field)
    paths = [path for path in paths if path.stat().st_size]  # an empty file is neither a table nor a document
    if not paths:
        raise UserError(f"{field}.files", source.files, "every file is empty", "give files with text")
    return paths


def _open_hub(source: TextSource, field: str) -> "datasets.IterableDataset":
    import datasets

    assert source.hub is not None
    remedy = "check the name, hub_config, hub_revision, split and the network, or give local files"
    with explained(f"{field}.hub", source.hub, "cannot be read from the hub", remedy):
        limit_waiting()
        rows = datasets.load_dataset(
            source.hub, source.hub_config, split=source.split, revision=source.hub_revision, streaming=True
        )
        first = next(iter(rows), None)
    return _documents_of_rows(rows, first, source, field)


def _matches(pattern: str, field: str) -> list[Path]:
    found = sorted(Path(name).absolute() for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not found:
        hint = f", for example {pattern.rstrip('/')}/**/*.txt" if os.path.isdir(pattern) else ""
        raise UserError(f"{field}.files", pattern, "no file matches", f"give a path or a glob of files{hint}")
    return found


def _stream_of_files(paths: list[Path], root: Path, source: TextSource, field: str) -> "datasets.IterableDataset":
    import datasets

    # A list among gen_kwargs is taken as shards: shuffling then permutes all files, not only those in its buffer
    kwargs = {"paths": [str(path) for path in paths], "root": str(root), "source": source, "field": field}
    return datasets.IterableDataset.from_generator(_documents_of_files, gen_kwargs=kwargs)


def _documents_of_files(paths: list[str], root: str, source: TextSource, field: str) -> Iterator[dict[str, str]]:
    for path in map(Path, paths):
        asked = "text" if source.standard_library else source.format
        name = path.relative_to(root).as_posix() if format_of(path, asked, field)[0] == "text" else None
        bad = 0
        for record in read_records(path, asked, source.field, field):
            problem = record.problem or text_problem(record.value)
            if problem is None:
                yield _document(record.value, name)
                continue
            problem = f"{record.place} {problem}".strip()
            if source.bad_records == "error":
                remedy = f'repair it or leave it out, or set {field}.bad_records = "skip"'
                raise UserError(f"{field}.files", str(path), problem, remedy)
            bad += 1
            if bad == 1:
                _warn_once("skipping records that cannot be read in %s, the first: %s", path, problem)
        if bad:
            _warn_once("skipped %d records that cannot be read in %s", bad, path)


_warned: set[tuple] = set()


def _warn_once(message: str, *values: object) -> None:
    """Once per process: a source is read again in each epoch, and from its beginning by each stage."""
    if (message, *values) not in _warned:
        _warned.add((message, *values))
        logger.warning(message, *values)


def _documents_of_rows(
    rows: "datasets.IterableDataset", first: dict[str, Any] | None, source: TextSource, field: str
) -> "datasets.IterableDataset":
    """Rows with any columns, of which `first` is the first, to {"id", "text"}."""
    if first is None:
        return rows
    if source.field not in first:
        raise no_column(source.field, first, source.hub, field)
    kwargs = {"column": source.field, "field": field}
    return rows.map(_document_of_row, fn_kwargs=kwargs, remove_columns=list(first))


def _document_of_row(row: dict[str, Any], column: str, field: str) -> dict[str, str]:
    if problem := text_problem(row.get(column)):
        raise UserError(f"{field}.field", column, problem, "name a column of text")
    return _document(row.get(column))


def _document(text: str | None, name: str | None = None) -> dict[str, str]:
    text = (text or "").removeprefix(BYTE_ORDER_MARK)
    return {"id": name or _digest(text).hex(), "text": text}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def _has_text(document: dict[str, str]) -> bool:
    return bool(document["text"].strip())


def _is_in_part(document: dict[str, str], part: Part, held_out: float) -> bool:
    share = int.from_bytes(_digest(document["text"]), "big") / 2**64
    return (share < held_out) == (part == "held_out")
