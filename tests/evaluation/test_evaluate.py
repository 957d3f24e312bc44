"""`evaluate` and `compare_arms` end to end, their files, and their refusals."""

import json
import shutil
from dataclasses import replace

import pytest
from tiny_models import MODELS, make_gla, make_llama

from statex.errors import UserError
from statex.evaluation import Request, compare_arms, evaluate, find_suite
from statex.evaluation.records import Score, read_scores, write_scores
from statex.results import read_results, write_results
from statex.results.statistics import wilson
from statex.results.suites import SUITES

ARMS = [("lpt", 0), ("lpt", 1), ("statex", 0), ("statex", 1)]


def value_of(results, suite, metric, **where):
    found = [row for row in results if (row.suite, row.metric, row.slice) == (suite, metric, where)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("name", MODELS)
def test_all_suites_on_every_model(name, tokenizer, evaluation, source, tmp_path):
    identity = {"model": name, "arm": "lpt", "seed": 0, "state_bytes": 7}
    request = Request(evaluation, text=source, output=tmp_path, training_length=64, identity=identity)
    results = evaluate(MODELS[name](), tokenizer, request)
    assert {row.suite for row in results} == set(evaluation.suites)
    mqar = value_of(results, "mqar", "accuracy", num_pairs=4, length=16)
    assert (mqar.n, mqar.unit, mqar.state_bytes, mqar.model) == (5, "fraction", 7, name)
    cell = value_of(results, "passkey", "accuracy", length=140, depth=0.25)
    assert (cell.low, cell.high) == (wilson(4 * cell.value, 4).low, wilson(4 * cell.value, 4).high)
    assert value_of(results, "passkey", "answer_nll", length=150).n == 8
    assert value_of(results, "passkey", "accuracy", length=150).note == "past the training length"
    assert 0 < value_of(results, "ar_hits", "hit_share").value < 1
    assert value_of(results, "nll_by_position", "nll", **{"from": 64, "to": 128}).note == "past the training length"
    assert value_of(results, "nll_by_position", "nll", **{"from": 32, "to": 64}).note == ""
    hits, others, share, whole = (
        value_of(results, "ar_hits", metric).value for metric in ("hit_nll", "other_nll", "hit_share", "nll")
    )
    assert share * hits + (1 - share) * others == pytest.approx(whole, rel=1e-5)
    for suite in evaluation.suites:
        scores = read_scores(tmp_path / "items" / f"{suite}.jsonl")
        assert len({score.item for score in scores}) == len(scores)
        assert all(score.digest for score in scores)
    write_results(tmp_path / "results.jsonl", results)
    assert read_results(tmp_path / "results.jsonl") == results


def test_a_second_call_reads_what_is_there(tokenizer, evaluation, source, tmp_path, monkeypatch):
    first = evaluate(make_gla(), tokenizer, Request(evaluation, text=source, output=tmp_path))
    path = tmp_path / "items" / "passkey.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("".join(line + "\n" for line in rows if "length-150" not in line))
    scored = []
    for name in SUITES:
        monkeypatch.setattr(f"statex.evaluation.suites.{name}.SUITE", _watched(find_suite(name), scored))
    assert evaluate(make_gla(), tokenizer, Request(evaluation, text=source, output=tmp_path)) == first
    assert scored == ["length-150-depth-0.25", "length-150-depth-0.75"]


def _watched(suite, scored):
    def score(context, cell):
        scored.append(cell.name)
        return suite.score(context, cell)

    return replace(suite, score=score)


@pytest.mark.parametrize("name", ["gla", "mamba2", "llama"])
def test_batches_of_1_and_of_3_give_the_same_scores(name, tokenizer, evaluation, source, tmp_path):
    scores = {}
    for size in (1, 3):
        settings = evaluation.model_copy(update={"batch_size": size})
        evaluate(MODELS[name](), tokenizer, Request(settings, text=source, output=tmp_path / str(size)))
        paths = sorted((tmp_path / str(size) / "items").glob("*.jsonl"))
        scores[size] = [score for path in paths for score in read_scores(path)]
    for one, other in zip(scores[1], scores[3], strict=True):
        assert (one.item, one.digest) == (other.item, other.digest)
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


@pytest.mark.parametrize("change", ["model", "settings", "training_length"])
def test_a_folder_of_other_settings_is_refused(tokenizer, evaluation, source, tmp_path, change):
    evaluation = evaluation.model_copy(update={"suites": ["mqar"]})
    evaluate(make_gla(), tokenizer, Request(evaluation, text=source, output=tmp_path))
    other = evaluation.model_copy(update={"seed": 1}) if change == "settings" else evaluation
    model = make_gla(seed=1) if change == "model" else make_gla()
    length = 32 if change == "training_length" else None
    with pytest.raises(UserError, match="was made with another"):
        evaluate(model, tokenizer, Request(other, text=source, output=tmp_path, training_length=length))


def test_a_text_whose_bad_records_are_now_skipped_is_the_same(tokenizer, evaluation, source, tmp_path):
    evaluation = evaluation.model_copy(update={"suites": ["mqar"]})
    first = evaluate(make_gla(), tokenizer, Request(evaluation, text=source, output=tmp_path))
    skipping = source.model_copy(update={"bad_records": "skip"})
    assert evaluate(make_gla(), tokenizer, Request(evaluation, text=skipping, output=tmp_path)) == first
    other = source.model_copy(update={"held_out": 0.4})
    with pytest.raises(UserError, match=r"another text\.held_out"):
        evaluate(make_gla(), tokenizer, Request(evaluation, text=other, output=tmp_path))


def test_an_unknown_suite_lists_the_known_ones(tokenizer, evaluation):
    with pytest.raises(UserError, match=r"known suites: mqar, passkey, ar_hits, nll_by_position"):
        evaluate(make_gla(), tokenizer, Request(evaluation.model_copy(update={"suites": ["pass_key"]})))


def test_attention_has_a_limit(tokenizer, evaluation, source):
    long = evaluation.model_copy(update={"passkey": evaluation.passkey.model_copy(update={"lengths": [161]})})
    with pytest.raises(UserError, match="160 tokens that this model"):
        evaluate(make_llama(), tokenizer, Request(long, text=source))


def test_text_that_is_too_short(tokenizer, evaluation, source):
    short = evaluation.nll_by_position.model_copy(update={"length": 100_000})
    with pytest.raises(UserError, match="no held-out document has that many tokens"):
        evaluate(make_gla(), tokenizer, Request(evaluation.model_copy(update={"nll_by_position": short}), text=source))


def test_without_a_tokenizer_only_ids_are_asked(evaluation):
    assert evaluate(make_gla(), None, Request(evaluation.model_copy(update={"suites": ["mqar"]})))
    with pytest.raises(UserError, match="tokenizer"):
        evaluate(make_gla(), None, Request(evaluation.model_copy(update={"suites": ["passkey"]})))


@pytest.fixture(scope="module")
def evaluated(tokenizer, evaluation, source, tmp_path_factory):
    """(arm, seed) -> its folder and its results, of a model for each."""
    found = {}
    for number, key in enumerate(ARMS):
        folder = tmp_path_factory.mktemp(f"{key[0]}-{key[1]}")
        model = make_gla(seed=number)
        found[key] = folder, evaluate(model, tokenizer, Request(evaluation, text=source, output=folder))
    return found


def test_arms_are_compared_item_by_item(evaluated):
    folders = {key: folder for key, (folder, _) in evaluated.items()}
    plain = {key: results for key, (_, results) in evaluated.items()}
    results = compare_arms(folders, model="gla", device="cpu")
    assert all(row.model == "gla" and row.device == "cpu" for row in results)
    where = {"length": 140}
    ours, theirs = (value_of(plain[arm, 0], "passkey", "answer_nll", **where).value for arm in ("statex", "lpt"))
    rows = [row for row in results if (row.suite, row.metric, row.slice) == ("passkey", "answer_nll", where)]
    differences = {row.seed: row for row in rows if row.baseline == "lpt"}
    assert set(differences) == {0, 1, None}
    assert all(row.arm == "statex" for row in differences.values())
    assert differences[0].value == pytest.approx(ours - theirs)
    assert "items only" in differences[0].details["interval"]
    assert differences[None].details["num_seeds"] == 2
    assert differences[None].details["power"]["detectable"] > 0
    assert (differences[None].details["power"]["items"] or differences[None].details["power"]["seeds"]) >= 1
    means = {row.arm: row for row in rows if row.baseline is None}
    assert set(means) == {"lpt", "statex"}
    assert means["statex"].value - means["lpt"].value == pytest.approx(differences[None].value)


def test_the_share_of_a_gap_that_recall_explains(tmp_path):
    """Ten documents; the arm gains 1 nat on every hit and 0.1 on every other token, 1 token in 5 being a hit."""
    folders = {}
    for arm, gains in (("lpt", (0.0, 0.0)), ("statex", (1.0, 0.1))):
        folders[arm, 0] = tmp_path / arm
        scores = []
        for number in range(10):
            hit, other = 3.0 + 0.1 * number - gains[0], 2.0 - gains[1]
            values = {"hit_nll": hit, "other_nll": other, "nll": (hit + 4 * other) / 5, "hit_share": 0.2}
            weights = {"hit_nll": 20.0, "other_nll": 80.0, "nll": 100.0, "hit_share": 100.0}
            scores.append(Score(f"windows/{number}", str(number), {}, values, weights, digest="same"))
        write_scores(folders[arm, 0] / "items" / "ar_hits.jsonl", scores)
    (share,) = [row for row in compare_arms(folders) if row.metric == "recall_share"]
    assert share.value == pytest.approx(1.0 / (1.0 + 4 * 0.1))
    assert share.low <= share.value <= share.high


def test_other_items_are_refused(evaluated, tmp_path):
    folders = {
        key: shutil.copytree(folder, tmp_path / "-".join(map(str, key))) for key, (folder, _) in evaluated.items()
    }
    path = folders["statex", 1] / "items" / "mqar.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["digest"] = "other"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="evaluate all arms with the same"):
        compare_arms(folders)
