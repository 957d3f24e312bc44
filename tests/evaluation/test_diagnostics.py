"""What diagnostics say about expanded models whose states are known."""

from dataclasses import replace

import pytest
import torch
from tiny_models import make_gla, make_mamba2

import statex
from statex.evaluation import Request
from statex.evaluation.diagnostics import (
    combine_seeds,
    diagnose,
    failure_signatures,
    without_new_state,
)
from statex.evaluation.reader import Reader
from statex.expansion.state_use import effective_rank, new_entries
from statex.expansion.stored import stored_plan
from statex.results import Result

CASES = [(make_gla, "preserve"), (make_gla, "inherit"), (make_gla, "reinit"), (make_mamba2, "preserve")]


def expanded(make, init):
    model = make()
    statex.expand(model, statex.ExpansionConfig(layers=[1], factor=2, init=init))
    return model.eval()


@pytest.mark.parametrize(("make", "init"), CASES)
def test_new_entries_are_as_many_as_the_state_grew(make, init):
    layer = stored_plan(expanded(make, init).config).layers[0]
    assert int(new_entries(layer).sum()) == layer.after.elements - layer.before.elements


@pytest.mark.parametrize(("make", "init"), CASES)
def test_diagnose(make, init, tokenizer, evaluation, source):
    model = expanded(make, init)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = diagnose(model, tokenizer, Request(evaluation, text=source, identity={"arm": init}), start=start)
    found = {row.metric: row for row in results}
    assert {row.arm for row in results} == {init}
    assert 0 < found["new_state_energy"].value < 1
    assert found["new_state_energy"].details["share_of_entries"] == 0.5
    for rank in (found["effective_rank"], found["effective_rank_without_new_state"]):
        assert 1 <= rank.value <= rank.details["largest_possible"]
    assert found["recall_drop_without_new_state"].slice["num_pairs"] == 4
    assert found["weight_change"].value == 0
    assert "not moved at all" in found["weight_change"].note
    if init == "preserve":  # nothing reads the new entries yet
        assert found["nll_rise_without_new_state"].value == pytest.approx(0, abs=1e-6)
    else:
        assert found["nll_rise_without_new_state"].value != 0


@pytest.mark.parametrize(("suites", "metric"), [(["mqar"], "recall_drop"), (["nll_by_position", "piqa"], "nll_rise")])
def test_only_what_the_suites_have_data_for_is_diagnosed(suites, metric, tokenizer, evaluation, source):
    asked = evaluation.model_copy(update={"suites": suites})
    results = diagnose(expanded(make_mamba2, "inherit"), tokenizer, Request(asked, text=source))
    assert [row.metric for row in results if not row.slice or "num_pairs" in row.slice] == [
        f"{metric}_without_new_state"
    ]


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_zeroing_the_new_state_of_a_preserving_expansion_brings_back_the_old_model(make):
    """But for what the next token itself writes and reads."""
    model, before = expanded(make, "preserve"), make()
    with torch.no_grad():  # wake the new entries up: random reads
        for name, tensor in model.named_parameters():
            if name in stored_plan(model.config).fresh_tensors and ("q_proj" in name or "in_proj" in name):
                tensor[tensor == 0] = 0.3
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    reader, old = Reader(model), Reader(before)
    _, state = reader.read(ids.tolist())
    _, reference = old.read(ids.tolist())
    plan = stored_plan(model.config)
    next_ids = [[5], [6]]
    awake, _ = reader.read(next_ids, reader.copy_state(state))
    emptied, _ = reader.read(next_ids, without_new_state(reader, state, plan))
    expected, _ = old.read(next_ids, reference)
    assert (awake - expected).abs().max() > 2 * (emptied - expected).abs().max()


def test_effective_rank_of_known_matrices():
    eye, one = torch.eye(4)[None, None], torch.ones(1, 1, 4, 4)
    assert effective_rank(eye).item() == pytest.approx(4)
    assert effective_rank(one).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(1, 1, 4, 4)).item() == 0


def test_a_model_without_a_plan_has_no_diagnostics(tokenizer, evaluation, source):
    assert diagnose(make_gla(), tokenizer, Request(evaluation, text=source)) == []


def test_several_seeds_are_one_value_with_an_interval():
    def row(seed, value, metric="new_state_energy", arm="reinit", half=0.01):
        bounds = {"low": value - half, "high": value + half} if metric != "weight_change" else {}
        return Result("diagnostics", metric, value, "fraction", **bounds, n=32, slice={"layer": 0}, arm=arm, seed=seed)

    rows = [
        row(0, 0.4),
        row(1, 0.5),
        row(2, 0.6),
        row(0, 0.3, arm="alone"),
        *(row(k, 0.2, "weight_change") for k in (0, 1)),
    ]
    (combined,) = combine_seeds(rows)
    assert (combined.arm, combined.seed, combined.metric, combined.n) == ("reinit", None, "new_state_energy", 32)
    assert combined.value == pytest.approx(0.5)
    assert 0 <= combined.low < 0.4
    assert combined.details["seeds"] == [0, 1, 2]


def test_interval_of_a_rank_holds_ranks():
    rows = [
        Result(
            "diagnostics", "effective_rank", value, low=value - 0.1, high=value + 0.1, n=32, arm="reinit", seed=seed,
            details={"largest_possible": 8},
        )
        for seed, value in enumerate((1.2, 7.9))
    ]  # fmt: skip
    (combined,) = combine_seeds(rows)
    assert (combined.low, combined.high) == (1.0, 8.0)


def difference(suite, metric, value, low, high, **where):
    return Result(suite, metric, value, low=low, high=high, n=9, slice=where, arm="reinit", baseline="lpt", seed=0)


def test_failures_are_stated_in_sentences():
    rows = [
        difference("nll_by_position", "nll", 0.2, 0.1, 0.3),
        difference("mqar", "accuracy", 0.5, 0.4, 0.6, num_pairs=8),
        difference("mqar", "accuracy", 0.01, -0.02, 0.04, num_pairs=32),
        difference("piqa", "acc", -0.05, -0.08, -0.02),
        difference("hellaswag", "acc", -0.05, -0.12, 0.02),
    ]
    signs = failure_signatures(rows)
    assert [row.metric for row in signs] == ["text_lost", "recall_flat", "text_lost"]
    assert "Text NLL changed by +0.200 against lpt (95 % interval +0.100 to +0.300)" in signs[0].note
    assert "32 pairs" in signs[1].note
    assert failure_signatures(rows, arms=["another"]) == []
    hits = [difference("ar_hits", metric, 0.3, 0.2, 0.4) for metric in ("nll", "hit_nll")]
    assert [row.slice["of"] for row in failure_signatures([*hits, rows[0]])] == ["ar_hits nll"]
    both = [replace(rows[0], seed=None), rows[0]]
    assert [row.seed for row in failure_signatures(both)] == [None]
    assert failure_signatures([difference("nll_by_position", "nll", -0.2, -0.3, -0.1)]) == []


@pytest.mark.parametrize(
    ("low", "high", "flat"),
    [(-0.02, 0.04, True), (-0.3, -0.1, True), (-0.02, 0.06, False), (-1.0, 1.0, False), (0.01, 0.04, False)],
)
def test_recall_is_flat_only_where_a_gain_is_ruled_out(low, high, flat):
    rows = [difference("mqar", "accuracy", (low + high) / 2, low, high, num_pairs=32)]
    assert [row.metric for row in failure_signatures(rows)] == ["recall_flat"] * flat
