"""Text out of files of every kind that we read, record by record, whatever the compression.

A file's ending says what it is. Only the text column of a table is read, so the others may hold anything, change their
types and differ between files. A record that cannot be read is yielded with a description of the problem; a file that
is damaged as a whole is an error.
"""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from statex.errors import UserError

TABLES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
"""A file's ending and its format."""
PLAIN = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .css .log .srt .yaml .yml .toml .ini .cfg
.py .pyi .c .h .cc .cpp .cxx .hpp .cu .cuh .java .kt .scala .js .jsx .ts .tsx .go .rs .rb .php .cs .swift
.sh .bash .sql .r .jl .lua .pl .hs .ml .ex .erl .clj .lisp .el .f90 .m .asm .s .vue .proto .cmake
"""
"""The endings of plain text."""
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

BYTE_ORDER_MARK = "\ufeff"
ROWS_WITHOUT_COLUMN = 1000
"""A column that is missing from this many rows of a file is taken to be misspelt."""
LONGEST_FIELD = 2**31 - 1
"""Longest field of a csv file; the csv module allows 131,072 characters by default."""


class Record(NamedTuple):
    """A record of a file: where it stands ("line 7"), what its column holds, or what is wrong with it."""

    place: str
    value: Any = None
    problem: str | None = None


def format_of(path: Path, asked: str | None, field: str) -> tuple[str, str | None]:
    """The format of a file and the ending of its compression, None for none.

    Args:
        asked: the format where the recipe gives one; else the ending decides, whatever its case.
        field: the recipe's name of the source, for errors.

    Raises:
        UserError: the ending is not a known one.
    """
    ending, compression = path.suffix.lower(), None
    if ending in COMPRESSIONS:
        ending, compression = Path(path.stem).suffix.lower(), ending
    found = asked or TABLES.get(ending) or ("text" if ending in PLAIN.split() else None)
    if found is None:
        problem = f'has the unknown ending "{ending}"' if ending else "has no ending that says what it holds"
        known = f"known are {', '.join(TABLES)}, plain text ({', '.join(PLAIN.split())})"
        remedy = f"{known}, and all of these behind them: {', '.join(COMPRESSIONS)}; or set {field}.format"
        raise UserError(f"{field}.files", str(path), problem, remedy)
    if found == "parquet" and compression is not None:
        problem = "is parquet, which has a compression of its own, inside another"
        raise UserError(f"{field}.files", str(path), problem, f"unpack the {compression} file")
    return found, compression


def read_records(path: Path, asked: str | None, column: str, field: str) -> Iterator[Record]:
    """The records of a file; a file of plain text is one.

    Raises:
        UserError: the file cannot be read, is damaged, or has no such column.
    """
    kind, compression = format_of(path, asked, field)
    with _file_errors(path, kind, compression, field):
        if kind == "parquet":
            yield from _read_parquet(path, column, field)
            return
        with _open(path, compression) as stream:
            if kind == "text":
                yield Record("", _decode(stream.read()))
            elif kind in ("csv", "tsv"):
                yield from _read_csv(stream, path, "," if kind == "csv" else "\t", column, field)
            else:
                rows = _json_lines(stream) if kind == "jsonl" else _json(stream, path, field)
                yield from _column_of(rows, path, column, field)


@contextmanager
def _file_errors(path: Path, kind: str, compression: str | None, field: str) -> Iterator[None]:
    """Turn what the readers raise into a UserError that quotes their message."""
    import pyarrow

    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.strerror:
            problem, remedy = f"cannot be read ({error.strerror})", "make it readable or leave it out"
        else:
            what = f".{kind}" if compression is None else f"{compression}, it is cut off or damaged"
            words = str(error).strip().partition("\n")[0]
            problem = f"cannot be read as {what} ({type(error).__name__}: {words})"
            remedy = "repair the file or leave it out"
        raise UserError(f"{field}.files", str(path), problem, remedy) from error


def _open(path: Path, compression: str | None) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if compression == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if compression == ".zst":
        import pyarrow

        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))
    return path.open("rb")


def _decode(data: bytes) -> str:
    """UTF-8 without its byte order mark; invalid bytes become lone surrogates, which `text_problem` finds.

    Thus a bad byte is reported for the column that holds it, not for its neighbours.
    """
    return data.decode("utf-8", errors="surrogateescape").removeprefix(BYTE_ORDER_MARK)


def text_problem(value: Any) -> str | None:
    """What is wrong with the value of a text column; a missing value is fine."""
    if value is None:
        return None
    if not isinstance(value, str):
        return f"the column holds {type(value).__name__}, not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"is not UTF-8 text (character {error.start})"
    return None


def no_column(column: str, known: Iterable[Any], path: object, field: str) -> UserError:
    names = ", ".join(map(str, known))
    return UserError(f"{field}.field", column, f"{path} has no such column", f"give one of: {names}")


def _json_lines(lines: Iterable[bytes]) -> Iterator[Record]:
    """Records whose values are whole rows."""
    for number, line in enumerate(lines, start=1):
        if text := _decode(line).strip():
            yield _parse(f"line {number}", text)


def _parse(place: str, text: str) -> Record:
    try:
        return _row(place, json.loads(text))
    except json.JSONDecodeError as error:
        return Record(place, problem=f"cannot be read as .jsonl (column {error.colno}: {error.msg})")
    except (
        ValueError,
        RecursionError,
    ) as error:  # an integer with thousands of digits; brackets nested a thousand deep
        return Record(place, problem=f"cannot be read as .jsonl ({error})")


def _row(place: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(place, value)
    return Record(place, problem=f"is {type(value).__name__}, not an object with columns")


def _json(stream: BinaryIO, path: Path, field: str) -> Iterator[Record]:
    """JSON lines where the first line is an object of its own; else an array of objects, or one object."""
    head: list[bytes] = []
    for line in stream:
        head.append(line)
        if line.strip():
            break
    if head and _parse("", _decode(b"".join(head)).strip()).problem is None:
        yield from _json_lines(itertools.chain(head, stream))
        return
    data = b"".join(head) + stream.read()
    text = _decode(data).strip()
    if not text:
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.startswith("{"):
            yield from _json_lines(data.split(b"\n"))
            return
        problem = f"is neither JSON lines nor a JSON array ({error})"
        raise UserError(f"{field}.files", str(path), problem, "repair the file or leave it out") from None
    rows = value if isinstance(value, list) else [value]
    yield from (_row(f"record {number}", row) for number, row in enumerate(rows, start=1))


def _column_of(rows: Iterable[Record], path: Path, column: str, field: str) -> Iterator[Record]:
    """One column of rows, which may lack it here and there, but not all of them."""
    found, others, count = False, dict[str, None](), 0
    for row in rows:
        if row.problem is None:
            count += 1
            found = found or column in row.value
            if not found:
                others |= dict.fromkeys(row.value)
                if count == ROWS_WITHOUT_COLUMN:
                    break
        yield row if row.problem is not None else row._replace(value=row.value.get(column))
    if count and not found:
        raise no_column(column, others, path, field)


def _read_csv(stream: BinaryIO, path: Path, delimiter: str, column: str, field: str) -> Iterator[Record]:
    """The first line names the columns; a record may have line breaks in quotes.

    Where a quote is never closed, its record is the line on which it opens, not the rest of the file.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    lines = _Lines(itertools.chain((_decode(stream.readline()),), map(_decode, stream)))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        names = next(filter(None, reader), None)  # an empty line before it names none
    except csv.Error as error:
        problem = f"has no line of column names ({error})"
        raise UserError(f"{field}.files", str(path), problem, "repair the file or leave it out") from None
    if not names:
        return
    if column not in names:
        raise no_column(column, names, path, field)
    place = names.index(column)
    while True:
        where = lines.begin_record()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.at_end:
                lines.return_all_but_first()
                reader = csv.reader(lines, delimiter=delimiter, strict=True)
            elif lines.last > lines.first:
                where = f"lines {lines.first} to {lines.last}"
            yield Record(where, problem=f"cannot be read as .csv ({error})")
            continue
        if len(row) == len(names):
            yield Record(where, row[place])
        elif row:
            yield Record(where, problem=f"has {len(row)} columns, where the first line names {len(names)}")


class _Lines:
    """The lines of a file for a reader that joins some into records; the lines of the last record can be read again."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.record, self.at_end = lines, list[str](), False
        self.first = 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self.lines)
        except StopIteration:
            self.at_end = True
            raise
        self.record.append(line)
        return line

    @property
    def last(self) -> int:
        """The number of the last line that was read."""
        return self.first + len(self.record) - 1

    def begin_record(self) -> str:
        """Begin a record with the next line, and name that line."""
        self.first, self.record = self.last + 1, []
        return f"line {self.first}"

    def return_all_but_first(self) -> None:
        """Have the lines of the record after its first one read again."""
        self.lines, self.record, self.at_end = iter(self.record[1:]), self.record[:1], False


def _read_parquet(path: Path, column: str, field: str) -> Iterator[Record]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        if table.metadata.num_rows == 0:
            return
        if column not in table.schema_arrow.names:
            raise no_column(column, table.schema_arrow.names, path, field)
        numbers = itertools.count(1)
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0):
                yield _parquet_value(f"row {next(numbers)}", value)


def _parquet_value(place: str, value: Any) -> Record:
    try:
        return Record(place, value.as_py())
    except UnicodeDecodeError as error:
        return Record(place, problem=f"is not UTF-8 text (byte {error.start})")
