"""What an edited evaluation removes of what an arm was measured by."""

import pytest

from statex.recipe import Evaluation
from statex.run import measuring
from statex.run.measuring import begin_evaluation, changed_settings, was_measured_by

BEFORE = Evaluation()
ITEMS = {"mqar", "passkey", "piqa"}


@pytest.fixture
def folder(tmp_path):
    """An arm that was measured by `BEFORE`."""
    (tmp_path / "evaluation" / "items").mkdir(parents=True)
    for name in ITEMS:
        (tmp_path / "evaluation" / "items" / f"{name}.jsonl").touch()
    for name in ("results.jsonl", "diagnostics.jsonl", "evaluation/evaluation.json", "evaluation/harness.json"):
        (tmp_path / name).touch()
    measuring.record_evaluation(tmp_path, BEFORE)
    return tmp_path


EDITS = {
    "a suite": ({"mqar": {"num_items": 5}}, {"passkey", "piqa"}, False),
    "lm-eval's tasks": ({"harness": {"limit": 5}}, {"mqar", "passkey"}, False),
    "which suites": ({"suites": ["mqar"]}, ITEMS, True),
    "all": ({"seed": 5}, set(), False),
    "another text": ({"text": {"files": ["a.txt"]}}, set(), False),
    "two": ({"mqar": {"num_items": 5}, "harness": {"limit": 5}}, {"passkey"}, False),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_an_edit_leaves(folder, edit):
    values, items, claims_stay = EDITS[edit]
    now = Evaluation.model_validate(values)
    assert not was_measured_by(folder, now)
    assert begin_evaluation(folder, now)
    assert {path.stem for path in (folder / "evaluation").glob("items/*.jsonl")} == items
    assert (folder / "evaluation" / "evaluation.json").exists() == claims_stay
    assert not (folder / "results.jsonl").exists()
    assert not (folder / "diagnostics.jsonl").exists()
    assert was_measured_by(folder, now)
    assert not was_measured_by(folder, BEFORE)


def test_what_was_killed_in_between_is_repaired(folder, monkeypatch):
    now = Evaluation.model_validate({"mqar": {"num_items": 5}})
    with monkeypatch.context() as patched:
        patched.setattr(measuring, "write_text_atomic", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            begin_evaluation(folder, now)
    assert not was_measured_by(folder, now)
    begin_evaluation(folder, now)
    assert {path.stem for path in (folder / "evaluation").glob("items/*.jsonl")} == {"passkey", "piqa"}
    assert was_measured_by(folder, now)


def test_the_same_evaluation_leaves_all(folder):
    before = set(folder.rglob("*"))
    assert begin_evaluation(folder, BEFORE)
    assert set(folder.rglob("*")) == before


def test_records_that_are_skipped_change_nothing_that_was_measured():
    source = {"text": {"files": ["a.jsonl"]}}
    skipping = {"text": {"files": ["a.jsonl"], "bad_records": "skip"}}
    assert changed_settings(*(Evaluation.model_validate(values) for values in (source, skipping))) == []
