"""lm-eval's tasks on our models, and our items on lm-eval's; skipped where lm-eval is not installed."""

import json

import pytest
import torch
from planted import PlantedModel
from tiny_models import VOCABULARY, make_gla, make_llama, make_mamba2

from statex.errors import UserError
from statex.evaluation.context import Cell, Context
from statex.evaluation.needles import Prompt, Question, score_prompts
from statex.evaluation.reader import Reader
from statex.recipe import Evaluation

pytest.importorskip("lm_eval")

from statex.evaluation.harness import HARNESS_GROUPS, TASKS_FOLDER, run_harness, scores_of
from statex.evaluation.harness.model import StateLM


@pytest.fixture(scope="module")
def saved_tokenizer(tokenizer, tmp_path_factory):
    """The tokenizer as lm-eval's tasks need it: with a path."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text(source):
    return {"text": source.model_dump()}


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


@pytest.mark.parametrize("make", [make_gla, make_mamba2, make_llama])
def test_requests_get_the_answers_of_lm_evals_own_model(make, saved_tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = make()
    ours = StateLM(Reader(model, piece=16), saved_tokenizer, batch_size=3)
    theirs = HFLM(pretrained=model, tokenizer=saved_tokenizer, backend="causal", max_length=160, batch_size=3)
    pairs = [
        ("abc def ghi", " jab"),
        ("abc def ghi", " fed cab dad"),
        ("a much longer context here", " ij"),
        ("", "ab"),
    ]
    asked = requests("loglikelihood", pairs)
    for (nll, greedy), (other, also) in zip(
        ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert nll == pytest.approx(other, abs=1e-3)
        assert greedy == also
    settings = {"until": ["~"], "max_gen_toks": 12, "do_sample": False}
    prompts = requests("generate_until", [("abc def", settings), ("abc def ghi jab cab", settings), ("d", settings)])
    assert ours.generate_until(prompts) == theirs.generate_until(prompts, disable_tqdm=True)
    texts = requests("loglikelihood_rolling", [("abc def ghi jab",), ("cab",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )


def test_lm_evals_niah_single_1_and_ours_give_the_same_score(saved_tokenizer):
    """Items exported from lm-eval's task, asked by our scorer: a model that remembers 300 tokens knows some."""
    pytest.importorskip("wonderwords")
    from lm_eval.tasks import TaskManager

    model = PlantedModel(VOCABULARY, saved_tokenizer, memory=420)
    meta = {"tokenizer": saved_tokenizer.name_or_path, "max_seq_lengths": [900]}
    task = TaskManager(metadata=meta).load(["niah_single_1"])["tasks"]["niah_single_1"]
    import lm_eval

    state_model = StateLM(Reader(model), saved_tokenizer, batch_size=4)
    samples = lm_eval.simple_evaluate(state_model, tasks=[task], limit=12, bootstrap_iters=0)["samples"]
    theirs = [sample["900"] for sample in samples["niah_single_1"]]
    prompts = [
        Prompt(sample["arguments"][0][0], (Question("", tuple(sample["doc"]["outputs"])),))
        for sample in samples["niah_single_1"]
    ]
    context = Context(Reader(model), saved_tokenizer, Evaluation(batch_size=5), None, None)
    ours = score_prompts(context, "niah_single_1", Cell("lm-eval"), prompts, 128)
    assert [score.scores["accuracy"] for score in ours] == theirs
    assert 0 < sum(theirs) < len(theirs)


def test_our_items_in_lm_eval_give_our_score(saved_tokenizer, source, text):
    from statex.evaluation import evaluate

    model = PlantedModel(VOCABULARY, saved_tokenizer, memory=420)
    names = ["niah_single_1", "niah_single_2", "niah_multikey", "variable_tracking", "passkey"]
    lengths = {"lengths": [1000], "num_items": 2}
    settings = Evaluation.model_validate({"suites": names} | dict.fromkeys(names, lengths))
    ours = evaluate(model, saved_tokenizer, settings, text=source)
    run = run_harness(
        model, saved_tokenizer, [f"statex_{name}" for name in names], lengths=[1000],
        metadata={"num_items": 2, **text},
    )  # fmt: skip
    assert not run.not_run
    for name in names:
        figure = next(r for r in ours if (r.suite, r.metric, r.slice) == (name, "accuracy", {"length": 1000}))
        other = next(row for row in run.results if row.suite == f"statex_{name}")
        assert (other.metric, other.slice) == ("accuracy", {"length": 1000})
        assert other.value == pytest.approx(figure.value)


def test_symbols_in_lm_eval(saved_tokenizer, text):
    run = run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], limit=8, metadata={"num_shots": [4], **text})
    assert [(row.metric, row.n) for row in run.results] == [("acc", 8)]


def test_what_lacks_its_data_is_not_run_and_has_no_figure(saved_tokenizer, tmp_path):
    run = run_harness(make_gla(), saved_tokenizer, ["piqa", "swde", "statex_nq"], output=tmp_path)
    assert run.results == []
    commands = {one.task: one.command for one in run.not_run}
    assert "load_dataset('hazyresearch/based-swde" in commands["swde"]
    assert "based_nq_2048" in commands["statex_nq"]
    assert commands["piqa"].startswith('python -c "import datasets; datasets.load_dataset(')
    assert len(json.loads((tmp_path / "not_run.json").read_text())) == 3


def test_open_book_cuts_the_passage_around_the_answer(saved_tokenizer, tmp_path):
    """Local data in the form of the hub's; a model that copies knows what follows the question's words."""
    passage = "filler words here " * 100 + "the capital is Qzx town. " + "more filler words " * 100
    rows = [{"context": passage, "question": "the capital is", "answers": ["qzx"]}] * 3
    rows.append({"context": "nothing", "question": "who", "answers": ["absent"]})
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_harness(
        PlantedModel(VOCABULARY, saved_tokenizer), saved_tokenizer, ["statex_drop"], lengths=[64, 256],
        metadata={"data": str(tmp_path)},
    )  # fmt: skip
    figures = {row.slice["length"]: (row.value, row.n) for row in run.results}
    assert figures == {64: (1.0, 3), 256: (1.0, 3)}


def test_a_second_call_reads_what_is_there(saved_tokenizer, text, tmp_path):
    arguments = {"limit": 4, "metadata": {"num_shots": [4], **text}, "output": tmp_path}
    first = run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **arguments)
    assert (tmp_path / "items" / "statex_symbol_icl.jsonl").exists()
    assert run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **arguments).results == first.results
    with pytest.raises(UserError, match="another"):
        run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **(arguments | {"limit": 5}))


def test_unknown_tasks_and_overlong_prompts_are_refused(saved_tokenizer, text):
    with pytest.raises(UserError, match="no such task"):
        run_harness(make_gla(), saved_tokenizer, ["no_such_task"])
    with pytest.raises(UserError, match="160 tokens"):
        run_harness(make_llama(), saved_tokenizer, ["statex_niah_single_1"], lengths=[600], metadata=text)


def test_groups_name_tasks_that_exist():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=str(TASKS_FOLDER)).all_tasks)
    assert {task for tasks in HARNESS_GROUPS.values() for task in tasks} <= known


def test_lengths_and_filters_of_samples_become_slices_and_metrics():
    common = {"prompt_hash": "p", "target_hash": "t", "doc_id": 3}
    ruler = common | {"filter": "none", "metrics": ["4096", "8192"], "4096": -1.0, "8192": 0.5}
    gsm = common | {"filter": "strict-match", "metrics": ["exact_match"], "exact_match": 1}
    one, other = scores_of("task", [ruler, gsm])
    assert (one.slice, one.scores) == ({"length": 8192}, {"accuracy": 0.5})
    assert (other.slice, other.scores) == ({}, {"exact_match_strict_match": 1.0})
    assert one.cluster == other.cluster


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
