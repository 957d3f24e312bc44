"""statex eval: suites, tasks of lm-eval, what is refused."""

import json
import sys
from pathlib import Path

import pytest
from calls import eval_arguments, nothing_new


def test_eval(call, gla, tmp_path):
    status, output, errors = call(*eval_arguments(gla, tmp_path / "out"), "--json")
    assert status == 0, errors
    written = json.loads(output)
    rows = written["results"]
    assert written["not_run"] == []
    assert {row["slice"]["num_pairs"] for row in rows} == {2, 4}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == len(rows)
    status, output, _ = call(*eval_arguments(gla, tmp_path / "out"))
    assert status == 0
    assert "accuracy" in output


def test_eval_in_another_dtype_which_the_results_name(call, gla, tmp_path):
    for dtype in ("float32", "bfloat16"):
        arguments = eval_arguments(gla, tmp_path / dtype, f"evaluation.dtype={dtype}")
        status, output, errors = call(*arguments, "--json")
        assert status == 0, errors
        assert {row["dtype"] for row in json.loads(output)["results"]} == {dtype}


def test_eval_of_no_suite_is_refused(call, gla, tmp_path):
    status, output, errors = call("eval", gla, "--out", tmp_path / "out", "--set", "evaluation.suites=[]")
    assert (status, output) == (2, "")
    assert "evaluation.suites = []: names nothing to measure; name a suite with --suite" in errors
    assert nothing_new(tmp_path)


def test_eval_of_another_suite_adds_to_what_is_there(call, gla, tmp_path):
    arguments = eval_arguments(gla, tmp_path / "out", "evaluation.symbol_icl.num_items=2")
    assert call(*arguments)[0] == 0
    before = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    arguments[3] = "symbol_icl"
    status, _, errors = call(*arguments)
    assert status == 0, errors
    rows = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert rows[: len(before)] == before
    assert {json.loads(row)["suite"] for row in rows[len(before) :]} == {"symbol_icl"}


def test_help_of_eval_lists_what_can_be_measured(call):
    from statex.results.suites import HARNESS_GROUPS, SUITES, suite_groups

    _, output, _ = call("eval", "--help")
    words = set(output.replace(",", " ").replace(":", " ").replace(".", " ").split())
    assert {*SUITES, *suite_groups(), *HARNESS_GROUPS} <= words


def test_options_of_eval_are_keys_of_a_recipe():
    from statex.cli.options import evaluation_overrides
    from statex.recipe import evaluation_sections

    assert evaluation_overrides(None, None, None) == []
    overrides = evaluation_overrides(7, "512,1024", 3, Path("sets of ü"))
    settings = evaluation_sections(overrides, suites=["passkey"]).evaluation
    assert (settings.harness.limit, settings.batch_size, settings.harness.data) == (7, 3, "sets of ü")
    for section in (settings.harness, settings.passkey, settings.niah_single_3, settings.variable_tracking):
        assert section.lengths == [512, 1024]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "512;1024"], "--lengths = '512;1024': is not a list of numbers; write for example"),
        (["--limit", "0"], "evaluation.harness.limit = 0: Input should be greater than or equal to 1"),
        (["--suite", "recal"], "evaluation.suites = 'recal': is not a suite; known suites: mqar"),
    ],
)
def test_eval_refuses_options(call, gla, tmp_path, options, message):
    status, output, errors = call("eval", gla, "--out", tmp_path / "out", *options, "--json")
    assert (status, output) == (2, "")
    assert message in errors
    assert nothing_new(tmp_path)


def test_eval_of_a_group_without_lm_eval(call, gla, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    status, output, errors = call("eval", gla, "--suite", "mqar", "--suite", "recall", "--out", tmp_path / "out")
    assert (status, output) == (2, "")
    assert "evaluation.suites = 'recall': needs lm-eval" in errors
    assert "install it with pip install 'statex[eval]'" in errors
    assert nothing_new(tmp_path)


def test_eval_of_tasks_whose_data_is_missing(call, gla, tmp_path):
    pytest.importorskip("lm_eval")
    arguments = [*eval_arguments(gla, tmp_path / "out"), "--suite", "statex_nq", "--suite", "statex_trec_fine"]
    status, output, errors = call(*arguments, "--json")
    assert status == 0, errors
    written = json.loads(output)
    assert {row["suite"] for row in written["results"]} == {"mqar"}
    missing = {one["task"]: one["command"] for one in written["not_run"]}
    assert list(missing) == ["statex_nq", "statex_trec_fine"]
    assert "load_dataset('SetFit/TREC-QC')" in missing["statex_trec_fine"]
    status, output, _ = call(*arguments)
    assert status == 0
    assert "not run: statex_nq (" in output
    assert f"\n    {missing['statex_nq']}\n" in output

    status, output, errors = call("eval", gla, "--suite", "statex_nq", "--out", tmp_path / "other", "--json")
    assert status == 1
    assert json.loads(output)["results"] == []
    assert "nothing could be run" in errors


def test_eval_of_tasks_beside_suites(call, gla, tmp_path):
    pytest.importorskip("lm_eval")
    arguments = [*eval_arguments(gla, tmp_path / "out"), "--suite", "statex_symbol_icl", "--limit", "2"]
    status, output, errors = call(*arguments, "--json")
    assert status == 0, errors
    rows = {row["suite"]: row for row in json.loads(output)["results"]}
    assert set(rows) == {"mqar", "statex_symbol_icl"}
    assert rows["statex_symbol_icl"]["low"] is not None
    assert rows["statex_symbol_icl"]["n"] == 2  # of each number of shots, seen and unseen
    assert "statex_symbol_icl" in errors  # progress
    written = (tmp_path / "out" / "items" / "statex_symbol_icl.jsonl").stat().st_mtime_ns
    status, output, _ = call(*arguments)
    assert status == 0
    assert "statex_symbol_icl" in output
    assert (tmp_path / "out" / "items" / "statex_symbol_icl.jsonl").stat().st_mtime_ns == written
    status, _, errors = call(*arguments[:-1], "3")
    assert status == 2
    assert "was made with another limit (2, now 3)" in errors


def test_eval_without_a_tokenizer(call, gla, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for path in gla.iterdir():
        if "token" not in path.name:
            (model / path.name).write_bytes(path.read_bytes())
    assert call(*eval_arguments(model, tmp_path / "out"))[0] == 0
    status, _, errors = call("eval", model, "--suite", "passkey", "--out", tmp_path / "other")
    assert status == 2
    assert "needs a tokenizer, and the model has none; give one, or drop this suite" in errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.mqar.num_pairs=[9]"], "evaluation.mqar.num_pairs = 9: does not fit num_keys and num_values"),
        (["evaluation.mqar.no_such=9"], "evaluation.mqar.no_such = 9: is not a known key"),
        (["training.steps=9"], "training = {'steps': 9}: is not a known key"),
        (['evaluation.text.files=["none/*"]', 'evaluation.suites=["nll_by_position"]'], "no file matches"),
    ],
)
def test_eval_refuses(call, gla, tmp_path, overrides, message):
    status, output, errors = call(*eval_arguments(gla, tmp_path / "out", *overrides), "--json")
    assert (status, output) == (2, "")
    assert message in errors


def test_eval_of_another_model_into_the_same_folder_is_refused(call, models, tmp_path):
    assert call(*eval_arguments(models["statex_gla"], tmp_path / "out"))[0] == 0
    status, _, errors = call(*eval_arguments(models["mamba2"], tmp_path / "out"))
    assert status == 2
    assert "choose another folder, or remove this one" in errors


def test_models_of_a_run_have_names_of_their_own():
    from statex.cli.options import model_name

    assert model_name("/models/gla-1.3B") == "gla-1.3B"
    assert model_name("/runs/demo/gla/lpt-seed0/trained") == "demo-gla-lpt-seed0-trained"
