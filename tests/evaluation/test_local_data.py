"""lm-eval's tasks on data sets of a local folder."""

import gzip
import json
import math
from pathlib import Path

import pytest
from harness import run_harness
from tiny_models import make_gla

from statex.errors import UserError

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from statex.evaluation.lm_eval.isolation import quiet
from statex.evaluation.lm_eval.local_data import USUAL_NAMES, find_parts
from statex.recipe import parse_recipe

PIQA = [{"goal": f"ab {i}", "sol1": "cab dig", "sol2": f"fed {i} hi", "label": i % 2} for i in range(6)]
CHOICES = {"text": ["ab", "cd e", "f"], "label": ["A", "B", "C"]}
ARC = [{"question": f"bad {i}", "choices": CHOICES, "answerKey": "ABC"[i % 3]} for i in range(5)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """One set has the end of the hub's name, the other one of the user's own."""
    folder = tmp_path / "data"
    for name, rows in {"piqa/validation.jsonl": PIQA, "mine/test.jsonl.gz": ARC}.items():
        (folder / name).parent.mkdir(parents=True)
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (folder / "data_sets.toml").write_text('"allenai/ai2_arc:ARC-Challenge" = "mine"\n')
    return folder


def alone(model, tokenizer, tmp_path, base, changes):
    """The values of lm-eval's own model on a copy of its task that is pointed at a local file."""
    tasks = Path(lm_eval.tasks.__file__).parent
    lines = [f"include: {tasks / base}", "task: local", "dataset_path: json", "dataset_name: null", *changes]
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "local.yaml").write_text("\n".join(lines) + "\n")
    manager = TaskManager(include_path=tmp_path / "local", include_defaults=False)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", max_length=160)
    with quiet():
        outcome = lm_eval.simple_evaluate(theirs, tasks=["local"], task_manager=manager, bootstrap_iters=0)
    return outcome["results"]["local"]


CASES = {
    "piqa": ("piqa/piqa.yaml", "piqa/validation.jsonl", "validation"),
    "arc_challenge": ("arc/arc_challenge.yaml", "mine/test.jsonl.gz", "test"),
}


@pytest.mark.parametrize("task", CASES)
def test_values_are_those_of_lm_eval_alone(task, folder, saved_tokenizer, tmp_path):
    base, path, split = CASES[task]
    run = run_harness(make_gla(), saved_tokenizer, [task], data=folder)
    assert run.not_run == []
    absent = [f"{name}_split: null" for name in ("training", "validation", "test") if not split.startswith(name[:4])]
    changes = ["dataset_kwargs:", f"  data_files: {{{split}: {folder / path}}}"]
    theirs = alone(make_gla(), saved_tokenizer, tmp_path, base, changes + absent)
    ours = {row.metric: row.value for row in run.results}
    assert ours
    assert ours == {metric: pytest.approx(theirs[f"{metric},none"]) for metric in ours}


def test_what_the_folder_lacks_is_not_run(folder, saved_tokenizer):
    (folder / "winogrande").mkdir()
    row = {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "1"}
    (folder / "winogrande" / "train.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "gsm8k").mkdir()
    (folder / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "1?", "answer": "#### 1"}) + "\n")
    run = run_harness(make_gla(), saved_tokenizer, ["winogrande", "gsm8k", "hellaswag"], data=folder)
    assert run.results == []
    reasons = {one.task: one.reason for one in run.not_run}
    assert reasons["winogrande"] == "the split that it is evaluated on has no rows"
    assert reasons["gsm8k"] == "the split that its examples come from has no rows"
    assert "Rowan/hellaswag" in reasons["hellaswag"]


def test_mistakes(folder, saved_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.harness\.data = .*none': is not a folder"):
        run_harness(make_gla(), saved_tokenizer, ["piqa"], data=tmp_path / "none", output=tmp_path / "out")
    (folder / "piqa" / "validation.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match=r"validation\.jsonl': cannot be read"):
        run_harness(make_gla(), saved_tokenizer, ["piqa"], data=folder)
    (folder / "data_sets.toml").write_text('"baber/piqa" = "nowhere"\n')
    with pytest.raises(UserError, match="'nowhere' for baber/piqa, which is not a folder"):
        run_harness(make_gla(), saved_tokenizer, ["piqa"], data=folder)


def test_the_folder_of_a_recipe_is_seen_from_the_recipe(tmp_path):
    values = {"name": "x", "models": {"m": {"checkpoint": "x"}}, "arms": {"lpt": {"kind": "lpt"}}}
    values["evaluation"] = {"harness": {"data": "sets"}}
    assert parse_recipe(values, relative_to=tmp_path).evaluation.harness.data == str(tmp_path / "sets")


@pytest.mark.parametrize(
    ("path", "name", "file"),
    [
        ("openai/gsm8k", "main", "gsm8k/test.jsonl"),
        ("openai/gsm8k", "main", "openai/gsm8k/test.parquet"),
        ("openai/gsm8k", "main", "gsm8k/main/test.csv"),
        ("nyu-mll/glue", "sst2", "glue/sst2/test.JSONL.gz"),
        ("nyu-mll/glue", "sst2", "sst2/test.jsonl"),
        ("EleutherAI/lambada_openai", "default", "lambada/test.jsonl"),
        ("allenai/ai2_arc", "ARC-Easy", "arc_easy/test.jsonl"),
        ("nyu-mll/blimp", "causative", "blimp/causative.jsonl.gz"),
    ],
)
def test_where_a_data_set_is_looked_for(tmp_path, path, name, file):
    assert find_parts(tmp_path, USUAL_NAMES, path, name) == {}
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("x")
    (tmp_path / file).with_name("README.md").write_text("x")
    split = "train" if "blimp" in file else "test"
    assert find_parts(tmp_path, USUAL_NAMES, path, name) == {split: tmp_path / file}
    assert find_parts(tmp_path, USUAL_NAMES, path, "other") == {}


def test_a_perplexity_is_the_mean_nll_of_its_items(saved_tokenizer, tmp_path):
    """lm-eval logs each item's log-likelihood under the name of the perplexity that it makes of all of them."""
    (tmp_path / "data" / "lambada").mkdir(parents=True)
    rows = [{"text": text} for text in ("ab cd ef", "dig fed cab jab", "a longer text of many words")]
    path = tmp_path / "data" / "lambada" / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_harness(make_gla(), saved_tokenizer, ["lambada_openai"], data=tmp_path / "data")
    assert run.not_run == []
    values = {row.metric: row for row in run.results}
    assert set(values) == {"nll", "acc"}
    assert (values["nll"].n, values["nll"].unit) == (3, "nats")
    changes = ["dataset_kwargs:", f"  data_files: {{test: {path}}}"]
    theirs = alone(make_gla(), saved_tokenizer, tmp_path, "lambada/lambada_openai.yaml", changes)
    assert values["nll"].value == pytest.approx(math.log(theirs["perplexity,none"]), rel=1e-4)
    assert values["nll"].low < values["nll"].value < values["nll"].high


@pytest.mark.parametrize("column", ["label", "label_fine"])
def test_many_shot_labels_by_either_name(saved_tokenizer, tmp_path, column):
    """The hub's copy of TREC calls the fine label otherwise than other copies do."""
    (tmp_path / "data" / "trec").mkdir(parents=True)
    rows = [{"text": f"who {i}", column: i % 2, "label_coarse": 0} for i in range(4)]
    for split in ("train", "test"):
        (tmp_path / "data" / "trec" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metadata = {"num_shots": [2]}
    run = run_harness(
        make_gla(), saved_tokenizer, ["statex_trec_fine"], data=tmp_path / "data", metadata=metadata, limit=2
    )
    assert run.not_run == []
    assert [row.n for row in run.results] == [2]
