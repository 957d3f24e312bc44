"""Where text comes from: one stream of {"id", "text"} documents, whatever the source.

`datasets` does the reading, streaming and shuffling; it is imported inside the functions, for it takes seconds.
"""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from statex.errors import UserError
from statex.recipe import TextSource

if TYPE_CHECKING:
    import datasets

Part = Literal["training", "held_out", "all"]

READERS = {".jsonl": "json", ".parquet": "parquet"}  # a file's ending and its reader in `datasets`

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
) -> "datasets.IterableDataset":
    """A stream of documents {"id": str, "text": str}; documents without text are left out.

    The id of a text file is its path below the folder that all files of the source share; the id of a row of jsonl,
    parquet or hub data is a hash of its text. The held-out share is chosen by a hash of the text, so it is the same
    on every machine, in every order, and a document that occurs twice is never in both parts.

    Args:
        source: the recipe's text source.
        part: "training" and "held_out" share the documents between them; "all" is both.
        shuffle_seed: shuffle the files and, in a moving buffer, the documents; `set_epoch(e)` on the result gives
            another order to each epoch. None keeps the order of the source.
        shuffle_buffer: documents that shuffling looks at.
        field: the recipe's name of the source, for errors.

    Raises:
        UserError: no file matches, a file or the hub cannot be read, the column is missing or holds no text, or the
            part has no document.
    """
    stream = _read(source, field)
    if part != "all":
        stream = stream.filter(_is_in_part, fn_kwargs={"part": part, "held_out": source.held_out})
    if next(iter(stream), None) is None:
        value = source.hub or source.files or "standard_library"
        if part == "held_out":
            remedy = f"give more documents or raise {field}.held_out (now {source.held_out})"
        else:
            remedy = "give a source with text"
        raise UserError(field, value, f'has no text in its part "{part}"', remedy)
    if shuffle_seed is not None:
        # One shard at a time: reading several takes threads, which `datasets` lets sleep 5 s at each end of parquet
        stream = stream.shuffle(seed=shuffle_seed, buffer_size=shuffle_buffer, max_buffer_input_shards=1)
    return stream


def _read(source: TextSource, field: str) -> "datasets.IterableDataset":
    """All documents with text, of whichever source."""
    import datasets

    if source.hub is not None:
        stream = _open_hub(source, field)
    elif source.standard_library:
        root = Path(sysconfig.get_path("stdlib"))
        stream = _open_text_files(standard_library_files(), root, field)
    else:
        parts = _open_files(source, field)
        stream = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
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


def _open_hub(source: TextSource, field: str) -> "datasets.IterableDataset":
    import datasets

    assert source.hub is not None
    try:
        rows = datasets.load_dataset(source.hub, source.hub_config, split=source.split, streaming=True)
        first = next(iter(rows), None)
    except (OSError, RuntimeError, ValueError) as error:  # not found, no network, no such configuration or split
        problem = f"cannot be read from the hub ({_first_line(error)})"
        remedy = "check the name, hub_config, split and the network, or give local files"
        raise UserError(f"{field}.hub", source.hub, problem, remedy) from error
    return _documents_of_rows(rows, first, source, field)


def _open_files(source: TextSource, field: str) -> "list[datasets.IterableDataset]":
    """One stream for each kind of file that the patterns name."""
    import datasets

    paths = [path for pattern in source.files or [] for path in _matches(pattern, field)]
    paths = [path for path in dict.fromkeys(paths) if path.stat().st_size]  # the readers stumble over empty files
    if not paths:
        raise UserError(f"{field}.files", source.files, "every file is empty", "give files with text")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    streams = []
    for suffix, reader in READERS.items():
        if chosen := [str(path) for path in paths if path.suffix == suffix]:
            try:
                rows = datasets.load_dataset(reader, data_files=chosen, split="train", streaming=True)
                first = next(iter(rows), None)
            except (OSError, RuntimeError, ValueError) as error:
                problem = f"cannot be read as {suffix} ({_first_line(error)})"
                raise UserError(f"{field}.files", chosen, problem, "repair the file or leave it out") from error
            streams.append(_documents_of_rows(rows, first, source, field))
    if plain := [path for path in paths if path.suffix not in READERS]:
        streams.append(_open_text_files(plain, root, field))
    return streams


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _matches(pattern: str, field: str) -> list[Path]:
    found = sorted(Path(name).absolute() for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
    if not found:
        hint = f", for example {pattern.rstrip('/')}/**/*.txt" if os.path.isdir(pattern) else ""
        raise UserError(f"{field}.files", pattern, "no file matches", f"give a path or a glob of files{hint}")
    return found


def _open_text_files(paths: list[Path], root: Path, field: str) -> "datasets.IterableDataset":
    import datasets

    # A list among gen_kwargs is taken as shards: shuffling then permutes all files, not only those in its buffer
    kwargs = {"paths": [str(path) for path in paths], "root": str(root), "field": field}
    return datasets.IterableDataset.from_generator(_text_files, gen_kwargs=kwargs)


def _text_files(paths: list[str], root: str, field: str) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
            raise UserError(f"{field}.files", path, problem, "make it readable or leave it out") from None
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 text (byte {error.start})"
            raise UserError(f"{field}.files", path, problem, "convert it or leave it out") from None
        yield {"id": Path(path).relative_to(root).as_posix(), "text": text}


def _documents_of_rows(
    rows: "datasets.IterableDataset", first: dict[str, Any] | None, source: TextSource, field: str
) -> "datasets.IterableDataset":
    """Rows with any columns, of which `first` is the first, to {"id", "text"}."""
    if first is None:
        return rows
    if source.field not in first:
        known = ", ".join(map(str, first))
        raise UserError(f"{field}.field", source.field, "there is no such column", f"give one of: {known}")
    kwargs = {"column": source.field, "field": field}
    return rows.map(_document_of_row, fn_kwargs=kwargs, remove_columns=list(first))


def _document_of_row(row: dict[str, Any], column: str, field: str) -> dict[str, str]:
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        problem = f"the column holds {type(text).__name__}, not text"
        raise UserError(f"{field}.field", column, problem, "name a column of text")
    text = text or ""
    return {"id": _digest(text).hex(), "text": text}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()


def _has_text(document: dict[str, str]) -> bool:
    return bool(document["text"].strip())


def _is_in_part(document: dict[str, str], part: Part, held_out: float) -> bool:
    share = int.from_bytes(_digest(document["text"]), "big") / 2**64
    return (share < held_out) == (part == "held_out")
