"""Folders of the first version, whose single plan is in words: fixtures that its code wrote."""

import copy
import json

import pytest
import torch
from test_numbers import FIXTURES, NAMES, changed

import statex
from common import logits, tokens
from statex.checkpoint import inspect
from statex.expansion.stored import stored_plan


def stored_by_version_1(name):
    return json.loads((FIXTURES / "plans" / f"{name}.json").read_text())


@pytest.fixture
def folder(request, tmp_path):
    """The folder that the first version would have written: today's weights are bitwise its own (test_numbers)."""
    changed(request.param).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored_by_version_1(request.param)))
    return tmp_path


def params(names):
    return pytest.mark.parametrize(("folder", "name"), [(name, name) for name in names], indirect=["folder"])


@params([name for name in NAMES if not name.startswith("rwkv7")])  # which is younger than version 2
def test_its_plan_is_read_as_today_s(folder, name):
    wanted, loaded = changed(name), statex.load(folder)
    plan = stored_plan(loaded.config)
    assert plan == stored_plan(wanted.config)
    in_words = plan.steps[0].in_words()
    assert in_words | {"version": 1} == stored_by_version_1(name)["expansion"]
    assert statex.state_report(loaded) == statex.state_report(wanted)
    assert inspect(folder).state == statex.state_report(wanted)
    with torch.no_grad(), statex.statex_ops():
        assert torch.equal(logits(loaded.eval(), tokens()), logits(wanted.eval(), tokens()))


@params(["gla-inherit", "mamba2-preserve"])
def test_it_is_saved_and_expanded_as_any_other(folder, name):
    loaded = statex.load(folder)
    loaded.save_pretrained(folder / "again")
    assert stored_plan(statex.load(folder / "again").config) == stored_plan(loaded.config)
    statex.expand(loaded, layers=[1], factor=2, init="inherit")
    assert [plan["version"] for plan in loaded.config.expansion] == [2, 2]
    loaded.save_pretrained(folder / "twice")
    assert len(stored_plan(statex.load(folder / "twice").config).steps) == 2


@params(["gla-inherit", "mamba2-preserve"])
def test_words_that_are_not_this_expansion_s_are_refused(folder, name):
    values = stored_by_version_1(name)
    for index, edit in enumerate(values["expansion"]["layers"][0]["tensors"]):
        other = copy.deepcopy(values)
        other["expansion"]["layers"][0]["tensors"][index]["edit"] = "kept" if edit["edit"] != "kept" else "fresh"
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(statex.UserError, match=r"config.json: expansion.layers.0.tensors = .*: is not what"):
            statex.inspect(folder)
