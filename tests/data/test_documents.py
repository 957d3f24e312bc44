import bz2
import gzip
import json
import lzma
import subprocess
import sys

import huggingface_hub.errors
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from statex.data.documents import open_documents, standard_library_files
from statex.errors import UserError
from statex.settings import TextSource


def read(*files, part="all", **values):
    return list(open_documents(TextSource(files=[str(file) for file in files], **values), part=part))


def parquet(columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
CONTENTS = {
    "a.jsonl": b'{"text": "one"}\n{"text": "two\\nlines"}\n',
    "a.JSONL": b'{"text": "one"}\r\n\r\n{"text": "two\\nlines"}',
    "a.ndjson": b'{"n": 1}\n{"text": "one", "n": "x"}\n{"text": "two\\nlines", "n": {"m": []}}\n',
    "lines.json": b'\n{"text": "one"}\n{"text": "two\\nlines"}\n',
    "array.json": b'[{"text": "one"},\n {"n": 1, "text": "two\\nlines"}]',
    "a.csv": b'n,text\n1,one\n2,"two\nlines"\n',
    "a.Tsv": b'text\tn\none\t1\n"two\nlines"\t2\n',
}
"""Two documents in each kind of table."""


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_keeps_order_and_drops_rows_without_text(tmp_path):
    rows = [{"id": 1, "text": "one"}, {"id": 2, "text": None}, {"id": 3, "text": "  \n"}, {"id": 4, "text": "four"}]
    documents = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [document["text"] for document in documents] == ["one", "four"]
    assert all(set(document) == {"id", "text"} and isinstance(document["id"], str) for document in documents)
    assert documents[0]["id"] != documents[1]["id"]


def test_parquet_and_another_column(tmp_path):
    pq.write_table(pa.table({"content": ["one", "two"], "text": [1, 2]}), tmp_path / "a.parquet")
    assert [document["text"] for document in read(tmp_path / "a.parquet", field="content")] == ["one", "two"]


def test_text_files_are_one_document_each_with_their_path_as_id(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b\nb")
    (tmp_path / "sub" / "a.md").write_text("a")
    (tmp_path / "empty.txt").write_text("")
    documents = read(tmp_path / "**" / "*.*")
    assert documents == [{"id": "b.txt", "text": "b\nb"}, {"id": "sub/a.md", "text": "a"}]


def test_kinds_of_files_mix_and_a_file_named_twice_is_read_once(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "json", "x": 1}])
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("plain")
    documents = read(tmp_path / "*", tmp_path / "a.txt")
    assert sorted(document["text"] for document in documents) == ["json", "parquet", "plain"]


def test_parts_share_the_documents_by_text_alone(jsonl, tmp_path):
    ids = {part: [document["id"] for document in read(jsonl, part=part, held_out=0.2)] for part in ("training", "all")}
    held_out = [document["id"] for document in read(jsonl, part="held_out", held_out=0.2)]
    assert sorted(ids["training"] + held_out) == sorted(ids["all"])
    assert 10 <= len(held_out) <= 40  # 24 expected of 120
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    other = write_jsonl(tmp_path / "other.jsonl", [{"text": row["text"], "n": 1} for row in rows[::-1] + rows[:9]])
    assert {document["id"] for document in read(other, part="held_out", held_out=0.2)} == set(held_out)


def test_shuffling_follows_seed_and_epoch(jsonl):
    source = TextSource(files=[str(jsonl)])

    def order(seed, epoch):
        documents = open_documents(source, shuffle_seed=seed, shuffle_buffer=50)
        documents.set_epoch(epoch)
        return [document["id"] for document in documents]

    first = order(1, 0)
    assert first == order(1, 0)
    assert first != order(1, 1)
    assert first != order(2, 0)
    assert sorted(first) == sorted(order(1, 1))


def test_standard_library():
    files = standard_library_files()
    assert files == sorted(files)
    assert 5e6 < sum(file.stat().st_size for file in files) < 20e6
    names = {file.name for file in files}
    assert "argparse.py" in names
    assert not any(part in ("site-packages", "test", "tests") for file in files for part in file.parts[-3:])
    documents = open_documents(TextSource(standard_library=True), part="all", shuffle_seed=0)
    documents = list(documents)
    assert "json/decoder.py" in {document["id"] for document in documents}
    assert len(documents) > 0.9 * len(files)  # every file decodes; some have no text


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_table_gives_its_column(tmp_path, name, mark):
    (tmp_path / name).write_bytes(mark + CONTENTS[name])
    assert [document["text"] for document in read(tmp_path / name)] == ["one", "two\nlines"]


@pytest.mark.parametrize("ending", [*COMPRESSIONS, ".GZ"])
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv"])
def test_compressed_tables(tmp_path, name, ending):
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(COMPRESSIONS[ending.lower()](CONTENTS[name]))
    assert [document["text"] for document in read(path)] == ["one", "two\nlines"]


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_text_and_files_of_several_parts(tmp_path, ending):
    compress = COMPRESSIONS[ending]
    (tmp_path / f"b.txt{ending}").write_bytes(compress(b"\xef\xbb\xbfone ") + compress(b"two"))
    assert read(tmp_path / f"b.txt{ending}") == [{"id": f"b.txt{ending}", "text": "one two"}]


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut off", "not compressed"])
@pytest.mark.parametrize("bad_records", ["error", "skip"])
def test_damaged_compression_names_the_file(tmp_path, ending, damage, bad_records):
    """Also where bad records are skipped: nobody knows how many a damaged file has lost."""
    path, data = tmp_path / f"a.jsonl{ending}", b'{"text": "some text"}\n' * 50
    path.write_bytes(COMPRESSIONS[ending](data)[:-5] if damage == "cut off" else data)
    with pytest.raises(UserError, match=rf"a\.jsonl{ending}': cannot be read as {ending}, it is cut off or damaged"):
        read(path, bad_records=bad_records)


def test_a_byte_order_mark_is_not_text(tmp_path):
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(f"{mark}plain", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        f'{mark}{{"text": "{mark}inside"}}\n{mark}{{"text": "joined"}}\n', encoding="utf-8"
    )
    (tmp_path / "c.parquet").write_bytes(parquet({"text": [f"{mark}parquet"]}))
    assert [document["text"] for document in read(tmp_path / "*")] == ["plain", "inside", "joined", "parquet"]


def test_only_the_column_of_the_text_is_read(tmp_path):
    """Others may be null first, change their types, come late and differ between files."""
    rows = [{"text": f"t{i}", "meta": None} for i in range(5000)]
    rows += [{"text": "late", "meta": "x", "new": [1]}, {"text": "later", "meta": {"a": 1}}, {"meta": 3}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"other": 1.5, "text": "b"}, {"other": "x", "text": None}])
    pq.write_table(pa.table({"text": ["p"], "meta": [1]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"meta": ["x"], "text": ["q"]}), tmp_path / "d.parquet")
    texts = [document["text"] for document in read(tmp_path / "*")]
    assert texts == [*(f"t{i}" for i in range(5000)), "late", "later", "b", "p", "q"]


def test_a_parquet_part_without_rows_is_skipped(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet({"text": pa.array([], pa.string())}))
    (tmp_path / "b.parquet").write_bytes(parquet({"other": pa.array([], pa.int64())}))
    (tmp_path / "c.parquet").write_bytes(parquet({"text": ["one"]}))
    assert [document["text"] for document in read(tmp_path / "*")] == ["one"]


def test_bad_records_are_skipped_where_the_recipe_says_so_and_counted(tmp_path, caplog):
    lines = [b'{"text": "one"}', b"{oops", b'{"text": 3}', b'{"text": "caf\xe9"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.csv").write_bytes(b'text,n\nthree,1\na,b,c\nfour,"2"x\nfive,3\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for _ in range(2):  # as in two epochs
        assert [row["text"] for row in read(tmp_path / "*", bad_records="skip")] == ["one", "two", "three", "five"]
    reported = [record.getMessage() for record in caplog.records]
    assert [message.partition(" in ")[0] for message in reported[1::2]] == [
        "skipped 3 records that cannot be read", "skipped 2 records that cannot be read",
        "skipped 1 records that cannot be read",
    ]  # fmt: skip
    assert f"{tmp_path / 'a.jsonl'}, the first: line 2 cannot be read as .jsonl" in reported[0]


@pytest.mark.parametrize(
    ("rows", "expected", "places"),
    [
        ('1,"a\n2,b\n3,c\n', ["b", "c"], ["line 3"]),
        ('1,"a\n2,b\n3,"c\nd"\n4,e', ["e"], ["lines 3 to 5", "line 6"]),
        ('1,a\n2,"b', ["a"], ["line 4"]),
        ('1,a\n"2,b\n"3,c\n4,d\n', ["a", "d"], ["lines 4 to 5"]),
        ('"\n"\n1,"x\ny"\n"\n2,b\n', ["x\ny", "b"], ["line 3", "line 7"]),
    ],
)
def test_a_quote_that_is_not_closed_costs_its_own_line(tmp_path, rows, expected, places, caplog):
    (tmp_path / "a.csv").write_text("\nn,text\n" + rows)
    assert [row["text"] for row in read(tmp_path / "a.csv", bad_records="skip")] == expected
    assert f"the first: {places[0]} " in caplog.text
    assert f"skipped {len(places)} records" in caplog.text
    with pytest.raises(UserError, match=f"{places[0]} cannot be read as .csv|{places[0]} has"):
        read(tmp_path / "a.csv")


def test_a_format_that_is_given_goes_before_the_ending(tmp_path):
    (tmp_path / "part-00000").write_bytes(CONTENTS["a.jsonl"])
    (tmp_path / "part-00001.gz").write_bytes(gzip.compress(CONTENTS["a.jsonl"]))
    assert [row["text"] for row in read(tmp_path / "part-*", format="jsonl")] == ["one", "two\nlines"] * 2
    assert read(tmp_path / "part-00000", format="text")[0]["id"] == "part-00000"


def test_column_names_of_csv_may_stand_behind_empty_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\n\r\nn,text\n1,one\n")
    (tmp_path / "b.csv").write_bytes(b"text\ntwo\n")
    assert [document["text"] for document in read(tmp_path / "*")] == ["one", "two"]


def test_long_fields_of_csv_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 50_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0]["text"]) == 250_000


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("none-*.txt", None, "text", "no file matches"),
        ("empty.jsonl", b"", "text", "every file is empty"),
        ("blank.txt", b"  \n", "text", 'has no text in its part "training"'),
        ("broken.jsonl", b"{oops\n", "text", "cannot be read as .jsonl"),
        ("broken.parquet", b"PAR1 and no more", "text", "cannot be read as .parquet"),
        ("column.jsonl", b'{"content": "a", "n": 1}\n', "text", "no such column; give one of: content, n"),
        ("number.jsonl", b'{"text": 3}\n', "text", "holds int, not text"),
        ("latin.txt", b"caf\xe9", "text", "is not UTF-8 text (character 3)"),
        ("late.jsonl", b'{"text": "a"}\n' * 9 + b'{"text": "b"\n', "text", "late.jsonl': line 10 cannot be read"),
        ("list.jsonl", b'{"text": "a"}\n\n["b"]\n', "text", "line 3 is list, not an object with columns"),
        ("latin.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "text", "line 2 is not UTF-8 text"),
        ("half.jsonl", b'{"text": "\\ud83d"}\n', "text", "line 1 is not UTF-8 text"),
        ("deep.jsonl", b"[" * 100_000 + b"\n", "text", "line 1 cannot be read as .jsonl"),
        ("array.json", b'[{"text": "a"}, {"text": 3}]', "text", "record 2 the column holds int, not text"),
        ("cut.json", b'[{"text": "a"},\n{"text": "b"', "text", "neither JSON lines nor a JSON array"),
        ("some.json", b'{"text": "a"}\n{"text" "b"}\n', "text", "line 2 cannot be read as .jsonl"),
        ("column.csv", b"content,n\na,1\n", "text", "no such column; give one of: content, n"),
        ("wide.csv", b"n,text\n1,a\n2,b,c\n", "text", "line 3 has 3 columns, where the first line names 2"),
        ("open.csv", b'n,text\n1,"a\n\n2,b\n', "text", "line 2 cannot be read as .csv"),
        ("column.parquet", parquet({"content": ["a"], "n": [1]}), "text", "no such column; give one of: content, n"),
        ("number.parquet", parquet({"text": [1]}), "text", "row 1 the column holds int, not text"),
        ("corpus.xyz", b"a", "text", 'the unknown ending ".xyz"; known are .jsonl, .ndjson, .json, .csv,'),
        ("corpus.tar.gz", b"a", "text", 'the unknown ending ".tar"'),
        ("corpus.gz", b"a", "text", "no ending that says what it holds"),
        ("corpus", b"a", "text", "or set data.text.format"),
        ("a.parquet.gz", b"a", "text", "unpack the .gz file"),
    ],
)
def test_bad_files(tmp_path, name, content, field, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.text") as raised:
        read(tmp_path / name, part="training", field=field)
    assert message in str(raised.value)


def test_a_folder_is_refused_with_a_glob_as_remedy(tmp_path):
    with pytest.raises(UserError, match=r"for example .*/\*\*/\*\.txt"):
        read(tmp_path)


def test_no_held_out_document_names_the_share(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    source = TextSource(files=[str(tmp_path / "a.txt")], held_out=1e-9)
    with pytest.raises(UserError, match=r"raise evaluation\.text\.held_out \(now 1e-09\)"):
        open_documents(source, part="held_out", field="evaluation.text")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"), ValueError("Bad split: train"), FileNotFoundError("x"),
        huggingface_hub.errors.HTTPError("a library's own, which is no OSError"),
    ],
)  # fmt: skip
def test_hub_that_cannot_be_read(monkeypatch, error):
    import datasets

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"data\.text\.hub = 'someone/text': cannot be read from the hub"):
        open_documents(TextSource(hub="someone/text"))


def test_hub_rows_become_documents(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "meta": [1, 2]}).to_iterable_dataset()
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or rows)
    documents = open_documents(
        TextSource(hub="someone/text", hub_config="en", hub_revision="v2", split="test"), part="all"
    )
    assert [document["text"] for document in documents] == ["a", "b"]
    assert asked == [(("someone/text", "en"), {"split": "test", "revision": "v2", "streaming": True})]


def test_importing_the_data_modules_does_not_import_datasets():
    code = "import sys, statex.data.mixture; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
