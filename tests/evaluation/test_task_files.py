"""Our own task files for lm-eval: our suites, many-shot classification, conversations, open-book questions."""

import json
import re
import shlex
from pathlib import Path

import lm_eval_alone
import pytest
from harness import run_harness
from planted import PlantedModel
from tiny_models import VOCABULARY, make_gla

from commands import run
from prefix_space import make_tokenizer
from statex.evaluation import Request
from statex.recipe import Evaluation
from statex.results.suites import HARNESS_GROUPS

pytest.importorskip("lm_eval")

from statex.evaluation.lm_eval import TASKS_FOLDER, load_tasks, task_manager


@pytest.fixture
def prefix_space_tokenizer(tmp_path):
    """One that puts a space before each text, as that of Llama 2."""
    from transformers import AutoTokenizer

    make_tokenizer("normalizer").save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("which", "names"),
    [
        ("saved_tokenizer", ["niah_single_1", "niah_single_2", "niah_multikey", "variable_tracking", "passkey"]),
        ("prefix_space_tokenizer", ["niah_multikey", "passkey"]),
    ],
)
def test_our_items_in_lm_eval_give_our_score(which, names, source, text, request):
    from statex.evaluation import evaluate

    saved_tokenizer = request.getfixturevalue(which)
    model = PlantedModel(VOCABULARY, saved_tokenizer, memory=420)
    lengths = {"lengths": [1000], "num_items": 2}
    settings = Evaluation.model_validate({"suites": names} | dict.fromkeys(names, lengths))
    ours = evaluate(model, saved_tokenizer, Request(settings, text=source))
    run = run_harness(
        model, saved_tokenizer, [f"statex_{name}" for name in names], lengths=[1000],
        metadata={"num_items": 2, **text},
    )  # fmt: skip
    assert not run.not_run
    for name in names:
        expected = next(r for r in ours if (r.suite, r.metric, r.slice) == (name, "accuracy", {"length": 1000}))
        other = next(row for row in run.results if row.suite == f"statex_{name}")
        assert (other.metric, other.slice) == ("accuracy", {"length": 1000})
        assert other.value == pytest.approx(expected.value)


@pytest.mark.parametrize("which", ["saved_tokenizer", "prefix_space_tokenizer"])
def test_symbols_in_lm_eval(which, text, request):
    """A perfect copier recalls what the shots show, and knows nothing of other symbols."""
    saved_tokenizer = request.getfixturevalue(which)
    copier = PlantedModel(VOCABULARY, saved_tokenizer)
    metadata = {"num_shots": [0, 4], "num_items": 6, **text}
    run = run_harness(copier, saved_tokenizer, ["statex_symbol_icl"], metadata=metadata)
    found = {(row.slice["shots"], row.slice["symbols"]): row for row in run.results}
    assert set(found) == {(0, "unseen"), (4, "seen"), (4, "unseen")}
    assert {(row.metric, row.unit, row.n) for row in run.results} == {("accuracy", "fraction", 6)}
    assert found[4, "seen"].value == 1.0
    assert found[4, "unseen"].value < 1.0


def documents_of(*arguments):
    """The function of that name in the module beside the many-shot tasks' files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(TASKS_FOLDER / "statex_trec_fine.yaml")["process_results"].__globals__["documents_of"](*arguments)


@pytest.mark.parametrize("count", [3, 8, 20])
def test_every_many_shot_question_can_be_answered(count):
    """Labels are numbers that only the examples tell, and the question's own is always among them."""
    examples = [(f"{label}-{i}", label) for label in "pqrstuvw" for i in range(5)]
    questions = [(f"{label}-new", label) for label in "pqrstuvw"]
    for document, (text, label) in zip(documents_of(examples, questions, [count]), questions, strict=True):
        *shown, question = document["input"].split("\n\n")
        numbers = {}
        for one in shown:
            example, number = one.split("\nlabel: ")
            assert numbers.setdefault(example[0], number) == number
        assert len(shown) == count
        assert question == f"{text}\nlabel:"
        assert numbers[label] == document["outputs"][0]
        assert len(numbers) == min(count, 8)


def test_many_shot_tasks_read_the_columns_of_their_data(saved_tokenizer, monkeypatch):
    import datasets

    rows = {
        "SetFit/TREC-QC": {"text": "who", "label": 17, "label_coarse": 3},
        "mteb/banking77": {"text": "my card", "label": 11, "label_text": "card_arrival"},
        "clinc/clinc_oos": {"text": "my flight", "intent": 42},
    }
    splits = {"clinc/clinc_oos": ("train", "validation")}

    def load_dataset(path, name=None, **options):
        assert (name == "plus") == (path == "clinc/clinc_oos")
        return {split: [rows[path]] * 2 for split in splits.get(path, ("train", "test"))}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = run_harness(
        PlantedModel(VOCABULARY, saved_tokenizer), saved_tokenizer, ["icl"], metadata={"num_shots": [2]}
    )  # fmt: skip
    assert run.not_run == []
    assert {row.suite: (row.slice, row.n, row.value) for row in run.results} == {
        name: ({"shots": 2}, 2, 1.0) for name in HARNESS_GROUPS["icl"]
    }


def test_a_conversation_is_asked_and_counted_as_coqa_does():
    from lm_eval.tasks._yaml_loader import load_yaml

    task = load_yaml(TASKS_FOLDER / "statex_coqa.yaml")
    document = {
        "story": "A cat sat.", "questions": {"input_text": ["Who?", "What did it do?"]},
        "answers": {"input_text": ["a cat", "It sat."]},
        "additional_answers": {"0": {"input_text": ["cat", "sat"]}, "1": {"input_text": ["the cat", "it SAT."]}},
    }  # fmt: skip
    assert task["doc_to_text"](document) == "A cat sat.\n\nQ: Who?\n\nA: a cat\n\nQ: What did it do?\n\nA:"
    assert task["doc_to_target"](document) == ["It sat.", "sat"]
    counted = task["process_results"](document, [" The, it sat\n\nQ: no"])
    assert counted["em"] == 0.5  # "it sat" against "sat", and against "it sat"
    assert counted["f1"] == pytest.approx((2 / 3 + 1) / 2)


def test_open_book_cuts_the_passage_around_the_answer(saved_tokenizer, tmp_path):
    """Local data in the form of the hub's; a model that copies knows what follows the question's words."""
    passage = "filler words here " * 100 + "the capital is Qzx town. " + "more filler words " * 100
    rows = [{"context": passage, "question": "the capital is", "answers": ["qzx"]}] * 3
    rows.append({"context": "[DOC] Nothing. Who. who", "question": "who", "answers": ["absent"]})
    rows.append({"context": "nothing", "question": "who", "answers": []})
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_harness(
        PlantedModel(VOCABULARY, saved_tokenizer), saved_tokenizer, ["statex_drop"], lengths=[114, 306],
        metadata={"data": str(tmp_path)},
    )  # fmt: skip
    found = {row.slice["length"]: (row.value, row.n) for row in run.results}
    assert found == {114: (0.75, 4), 306: (0.75, 4)}
    meta = {"tokenizer": saved_tokenizer.name_or_path, "max_seq_lengths": [114, 306], "data": str(tmp_path)}
    (task,) = load_tasks(task_manager(["statex_drop"], meta), "statex_drop")
    texts = [task.doc_to_text(document) for document in task.eval_docs]
    for text, room in zip(texts[:2], (64, 256), strict=True):
        assert text.endswith(". the capital is")
        tokens = len(saved_tokenizer(text.removesuffix(" the capital is"))["input_ids"])
        assert room - 4 <= tokens <= room + 4  # a word cut in two may have more tokens than before
        before, after = (len(saved_tokenizer(part)["input_ids"]) for part in text.split(" Qzx"))
        assert before == pytest.approx(after - 8, abs=8)  # behind it stands the question too
    assert texts[-1] == "Nothing. Who. who"


@pytest.mark.slow
def test_the_documented_command_asks_any_model(saved_tokenizer, tmp_path):
    """lm_eval alone, on a folder that it knows nothing of."""
    make_gla(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(tmp_path / "model")
    saved_tokenizer.save_pretrained(tmp_path / "model")
    document = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command = re.search(r"```bash\n(lm_eval .*?)```", document, re.DOTALL)[1].replace("MODEL", str(tmp_path / "model"))
    changed = command.replace("[1024, 2048]", "[1100]").replace('"num_items": 5', '"num_items": 1')
    assert changed != command
    substitution = re.compile(r"\$\(python -c '(.*?)'\)")
    printed = run(exec, substitution.search(changed)[1], {"__name__": "__main__"})
    assert printed.returncode == 0, printed.stderr
    arguments = shlex.split(substitution.sub(printed.stdout.strip(), changed).replace("\\\n", " "))
    options = ["--limit", "2", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    done = run(lm_eval_alone.main, arguments + options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    assert 0 <= results["statex_niah_single_1"]["1100,none"] <= 1
    assert 0 <= results["statex_symbol_icl"]["shots_0_unseen,none"] <= 1
