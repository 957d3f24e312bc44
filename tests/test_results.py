"""Results on disk: what is written is read again, and a file is whole or not there."""

import json
from dataclasses import asdict

import pytest

from statex.results import Result, read_results, write_results
from statex.utils.atomic import new_folder, write_text_atomic

RESULTS = [
    Result("mqar", "accuracy", 0.25, "fraction", 0.1, 0.4, 32, {"num_pairs": 8}, "gla", "lpt", 0, None, 4096, "a CPU"),
    Result("mqar", "accuracy", -0.125, baseline="lpt", details={"items_needed": 12}, note="past the training length"),
    Result("text", "nll", float("inf")),
]


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, RESULTS)
    assert read_results(path) == RESULTS
    assert [json.loads(line) for line in path.read_text().splitlines()] == [asdict(result) for result in RESULTS]
    write_results(path, iter(RESULTS[:1]))
    assert read_results(path) == RESULTS[:1]
    write_results(path, [])
    assert read_results(path) == []
    assert [each.name for each in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_newer_version_s_keys_and_empty_lines_are_passed_over(tmp_path):
    path = tmp_path / "results.jsonl"
    row = asdict(RESULTS[0]) | {"colour": "blue"}
    path.write_text(f"\n{json.dumps(row)}\n\n")
    assert read_results(path) == RESULTS[:1]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.jsonl"
    write_results(path, RESULTS)

    def half():
        yield RESULTS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_results(path, half())
    assert read_results(path) == RESULTS


def test_a_killed_writer_s_remains_do_no_harm(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("half")
    write_text_atomic(tmp_path / "a.txt", "whole")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").write_text("half")
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("whole")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "a.txt",
        "out",
        "out/whole",
    ]
