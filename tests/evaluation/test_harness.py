"""lm-eval's tasks on our models, and our items on lm-eval's; skipped where lm-eval is not installed."""

import json
import math
import re
from pathlib import Path

import pytest
from harness import run_harness
from planted import PlantedModel
from tiny_models import VOCABULARY, make_gla, make_llama, make_mamba2

from statex.errors import UserError
from statex.evaluation import Request
from statex.evaluation.context import Context
from statex.evaluation.prompts.needles import Prompt, Question, score_prompts
from statex.evaluation.reader import Reader
from statex.evaluation.suite import Cell
from statex.recipe import Evaluation
from statex.results.suites import HARNESS_GROUPS, SUITES

pytest.importorskip("lm_eval")

from statex.evaluation.lm_eval import load_tasks, task_manager
from statex.evaluation.lm_eval.isolation import offline, quiet
from statex.evaluation.lm_eval.model import StateLM
from statex.evaluation.lm_eval.samples import scores_of


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, place) for place, one in enumerate(arguments)]


@pytest.fixture
def bos_tokenizer(saved_tokenizer, tmp_path):
    """One that begins every text with a token of its own, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    saved_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, bos_token=saved_tokenizer.eos_token)
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start[0]} $A", pair=f"{start[0]} $A $B", special_tokens=[start]
    )
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("which", ["saved_tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("make", [make_gla, make_mamba2, make_llama])
def test_requests_get_the_answers_of_lm_evals_own_model(make, which, request):
    from lm_eval.models.huggingface import HFLM

    model, saved_tokenizer = make(), request.getfixturevalue(which)
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
    assert ours.generate_until(requests("generate_until", [("", settings)]))
    if which == "bos_tokenizer":
        return  # lm-eval's also counts how likely the beginning is, behind another one
    texts = requests("loglikelihood_rolling", [("abc def ghi jab",), ("cab",)])
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-3
    )


def test_a_tokenizer_without_a_token_to_begin_with_is_refused(saved_tokenizer, tmp_path):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=saved_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="has neither bos_token nor eos_token"):
        StateLM(Reader(make_gla()), bare, batch_size=1)
    with pytest.raises(UserError, match="has neither bos_token nor eos_token"):
        run_harness(make_gla(), bare, ["piqa"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lm_evals_niah_single_1_and_ours_give_the_same_score(saved_tokenizer):
    """Items exported from lm-eval's task, asked by our scorer: a model that remembers 420 tokens knows some."""
    pytest.importorskip("wonderwords")
    import lm_eval

    model = PlantedModel(VOCABULARY, saved_tokenizer, memory=420)
    meta = {"tokenizer": saved_tokenizer.name_or_path, "max_seq_lengths": [900]}
    with offline():
        manager = task_manager(["niah_single_1"], meta)
        (task,) = load_tasks(manager, "niah_single_1")
    state_model = StateLM(Reader(model), saved_tokenizer, batch_size=4)
    options = {"task_manager": manager, "limit": 8, "bootstrap_iters": 0}
    with quiet():
        samples = lm_eval.simple_evaluate(state_model, tasks=[task], **options)["samples"]
    theirs = [sample["900"] for sample in samples["niah_single_1"]]
    prompts = [
        Prompt(sample["arguments"][0][0], (Question("", tuple(sample["doc"]["outputs"])),))
        for sample in samples["niah_single_1"]
    ]
    context = Context(Reader(model), saved_tokenizer, Evaluation(batch_size=5), None, None)
    ours = score_prompts(context, Cell("lm-eval"), prompts, 128)
    assert [score.scores["accuracy"] for score in ours] == theirs
    assert 0 < sum(theirs) < len(theirs)


def test_the_machine_is_not_described_after_each_task(saved_tokenizer, hub, monkeypatch):
    import lm_eval.evaluator

    described = []
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", described.append)
    run = run_harness(make_gla(), saved_tokenizer, ["fda"])
    assert run.results
    assert not described
    assert lm_eval.evaluator.add_env_info == described.append  # as it was for others


def test_what_lacks_its_data_is_not_run_and_has_no_value(saved_tokenizer, tmp_path):
    run = run_harness(make_gla(), saved_tokenizer, ["piqa", "swde", "statex_nq"], output=tmp_path)
    assert run.results == []
    commands = {one.task: one.command for one in run.not_run}
    assert "load_dataset('hazyresearch/based-swde" in commands["swde"]
    assert "based_nq_2048" in commands["statex_nq"]
    assert commands["piqa"].startswith('python -c "import datasets; datasets.load_dataset(')
    assert len(json.loads((tmp_path / "not_run.json").read_text())) == 3
    again = run_harness(make_gla(), saved_tokenizer, ["statex_nq", "statex_trec_fine"], output=tmp_path)
    kept = [row["task"] for row in json.loads((tmp_path / "not_run.json").read_text())]
    assert kept == ["piqa", "swde", *(one.task for one in again.not_run)]


def test_code_of_a_model_is_not_run_unasked(saved_tokenizer, monkeypatch):
    """Nor the code of the task, which tries its metric as soon as it is loaded."""
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    (refused,) = run_harness(make_gla(), saved_tokenizer, ["humaneval"]).not_run
    assert refused.command == "statex eval MODEL --suite humaneval --set evaluation.harness.unsafe_code=true"
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    (lacking,) = run_harness(make_gla(), saved_tokenizer, ["humaneval"], unsafe_code=True).not_run
    assert lacking.command == "python -c \"import evaluate; evaluate.load('code_eval')\""


ROWS = {
    "hazyresearch/based-squad": [
        {"text": f"the value of {i} is ab{i}. the value of {i} is", "value": f"ab{i}"} for i in range(3)
    ],
    "hazyresearch/based-swde-v2": [{"text": "Of fed: jab cab. Of dad: hi. Of fed:", "value": "jab cab"}],
    "hazyresearch/based-fda": [{"text": "Of fed: jab cab. Of dad: hi. Of fed:", "value": "dig"}],
    "openai/gsm8k": [{"question": f"What is {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(8)],
}
"""Of the data sets on the hub, in their columns."""


@pytest.fixture
def hub(monkeypatch):
    """The data sets of ROWS, as if they had been fetched."""
    import datasets

    def load_dataset(path, name=None, **options):
        rows = datasets.Dataset.from_list(ROWS[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_lm_evals_own_tasks_give_values_with_intervals(saved_tokenizer, hub):
    """A model that copies is right where the value follows its key, and SQuAD's answer ends with its line."""
    model = PlantedModel(VOCABULARY, saved_tokenizer)
    run = run_harness(model, saved_tokenizer, ["squad_completion", "swde", "fda", "gsm8k"], limit=2)
    assert run.not_run == []
    found = {(row.suite, row.metric): row for row in run.results}
    assert {key: row.value for key, row in found.items() if key[1] == "contains"} == {
        ("squad_completion", "contains"): 1.0, ("swde", "contains"): 1.0, ("fda", "contains"): 0.0,
    }  # fmt: skip
    squad = found["squad_completion", "contains"]
    assert (squad.n, squad.unit) == (2, "fraction")
    assert squad.low < 0.5 < squad.high == 1.0
    assert {metric for suite, metric in found if suite == "gsm8k"} == {
        "exact_match_strict_match", "exact_match_flexible_extract",
    }  # fmt: skip


def test_squad_completion_is_asked_as_it_was_published(hub):
    (task,) = load_tasks(task_manager(["squad_completion"]), "squad_completion")
    (request,) = task.construct_requests(ROWS["hazyresearch/based-squad"][0], "the value", metadata=("", 0, 1))
    assert request.args == ("the value", {"until": ["\n"], "max_gen_toks": 48, "do_sample": False})


@pytest.mark.parametrize("name", ["niah_single_1", "ruler_cwe"])
def test_ruler_asks_the_same_in_every_call(saved_tokenizer, name):
    """lm-eval draws its items from random, wherever that is, or resumes a generator of its own."""
    pytest.importorskip("wonderwords")
    manager = task_manager([name], {"tokenizer": saved_tokenizer.name_or_path, "max_seq_lengths": [2000]})
    first, second = (load_tasks(manager, name)[0].eval_docs[0] for _ in range(2))
    assert first["input"] == second["input"]


def test_what_lm_eval_would_retry_forever_is_not_run(saved_tokenizer):
    """The example of ruler_vt has 500 tokens, and this tokenizer makes more of the shortest."""
    pytest.importorskip("wonderwords")
    (refused,) = run_harness(make_gla(), saved_tokenizer, ["ruler_vt"]).not_run
    assert "too long with this tokenizer" in refused.reason
    assert refused.command == "statex eval MODEL --suite variable_tracking"


def test_a_limit_takes_some_of_every_length_and_depth(saved_tokenizer, text):
    model, meta = PlantedModel(VOCABULARY, saved_tokenizer, memory=420), {"num_items": 2, **text}
    run = run_harness(model, saved_tokenizer, ["statex_passkey"], lengths=[300, 600], limit=5, metadata=meta)
    found = {row.slice["length"]: (row.value, row.n) for row in run.results}
    assert found == {300: (1.0, 5), 600: (0.6, 5)}  # of depths 0.1 to 0.9, those within 420 tokens of the end


def test_a_task_and_a_suite_of_one_name_do_not_meet(saved_tokenizer, source, text, tmp_path):
    pytest.importorskip("wonderwords")
    from statex.evaluation import measure_model

    model = PlantedModel(VOCABULARY, saved_tokenizer)
    values = {
        "suites": ["niah_single_1", "lm_eval_niah_single_1"], "harness": {"limit": 2, "lengths": [900]},
        "niah_single_1": {"lengths": [900], "num_depths": 1, "num_items": 3},
    }  # fmt: skip
    settings = Evaluation.model_validate(values)
    first = measure_model(model, saved_tokenizer, Request(settings, text=source, output=tmp_path))
    numbers = {row.suite: row.n for row in first.results if row.metric == "accuracy"}
    assert numbers == {"niah_single_1": 3, "lm_eval_niah_single_1": 2}
    assert measure_model(model, saved_tokenizer, Request(settings, text=source, output=tmp_path)) == first
    with pytest.raises(UserError, match="was made with another model"):
        run_harness(make_gla(), saved_tokenizer, ["statex_passkey"], output=tmp_path)


def test_a_second_call_reads_what_is_there(saved_tokenizer, text, tmp_path):
    arguments = {"limit": 4, "metadata": {"num_shots": [4], **text}, "output": tmp_path}
    first = run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **arguments)
    assert (tmp_path / "items" / "statex_symbol_icl.jsonl").exists()
    assert run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **arguments).results == first.results
    arguments["metadata"] |= {"text": text["text"] | {"bad_records": "skip"}}
    assert run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **arguments).results == first.results
    with pytest.raises(UserError, match="another"):
        run_harness(make_gla(), saved_tokenizer, ["statex_symbol_icl"], **(arguments | {"limit": 5}))


def test_unknown_tasks_and_overlong_prompts_are_refused(saved_tokenizer, text):
    with pytest.raises(UserError, match="is not a suite"):
        run_harness(make_gla(), saved_tokenizer, ["no_such_task"])
    with pytest.raises(UserError, match="160 tokens"):
        run_harness(make_llama(), saved_tokenizer, ["statex_niah_single_1"], lengths=[600], metadata=text)


def test_the_document_lists_every_task():
    document = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {row.split("`")[1]: row for row in document.splitlines() if row.startswith("| `")}
    for group in {*HARNESS_GROUPS} - {"statex", "long-context"}:
        assert re.findall(r"`(\w+)`", rows[group].split("|")[2]) == [*HARNESS_GROUPS[group]]
    assert {*SUITES} <= {"niah_single_2", "niah_single_3", *rows}


def test_groups_name_tasks_that_exist():
    """In the folders that are indexed at once."""
    tasks = {task for tasks in HARNESS_GROUPS.values() for task in tasks}
    assert tasks <= {*task_manager(sorted(tasks)).all_tasks}


def test_lengths_and_filters_of_samples_become_slices_and_metrics():
    common = {"prompt_hash": "p", "target_hash": "t", "doc_id": 3}
    ruler = common | {"filter": "none", "metrics": ["4096", "8192"], "4096": -1.0, "8192": 0.5}
    gsm = common | {"filter": "strict-match", "metrics": ["exact_match"], "exact_match": 1}
    one, other = scores_of("task", [ruler, gsm], {"exact_match,strict-match": 1.0})
    assert (one.slice, one.scores) == ({"length": 8192}, {"accuracy": 0.5})
    assert (other.slice, other.scores) == ({}, {"exact_match_strict_match": 1.0})
    assert one.cluster == other.cluster


def test_a_metric_that_is_not_the_mean_of_its_items_is_left_out(caplog):
    common = {"prompt_hash": "p", "target_hash": "t", "filter": "none", "metrics": ["acc", "ppl", "median"]}
    samples = [
        common | {"doc_id": place, "acc": place % 2, "ppl": -float(place), "median": place**2} for place in range(3)
    ]
    scores = scores_of("task", samples, {"acc,none": 1 / 3, "ppl,none": math.exp(1.0), "median,none": 1.0})
    assert [score.scores for score in scores] == [{"acc": place % 2, "nll": float(place)} for place in range(3)]
    assert "task: median is left out" in caplog.text
