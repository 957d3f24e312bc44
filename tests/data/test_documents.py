import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from statex.data.documents import open_documents, standard_library_files
from statex.errors import UserError
from statex.recipe import TextSource


def read(*files, part="all", **values):
    return list(open_documents(TextSource(files=[str(file) for file in files], **values), part=part))


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
        ("latin.txt", b"caf\xe9", "text", "is not UTF-8 text"),
    ],
)
def test_bad_files(tmp_path, name, content, field, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^data\.text") as raised:
        read(tmp_path / name, part="training", field=field)
    assert message in str(raised.value)


def test_a_folder_is_told_how_to_be_a_glob(tmp_path):
    with pytest.raises(UserError, match=r"for example .*/\*\*/\*\.txt"):
        read(tmp_path)


def test_no_held_out_document_names_the_share(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    source = TextSource(files=[str(tmp_path / "a.txt")], held_out=1e-9)
    with pytest.raises(UserError, match=r"raise evaluation\.text\.held_out \(now 1e-09\)"):
        open_documents(source, part="held_out", field="evaluation.text")


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("Bad split: train"), FileNotFoundError("x")])
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
    documents = open_documents(TextSource(hub="someone/text", hub_config="en", split="test"), part="all")
    assert [document["text"] for document in documents] == ["a", "b"]
    assert asked == [(("someone/text", "en"), {"split": "test", "streaming": True})]


def test_importing_the_data_modules_does_not_import_datasets():
    code = "import sys, statex.data.mixture; print('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
