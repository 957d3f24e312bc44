"""Every recall suite gives planted models the score that their memory deserves, and no other."""

from dataclasses import replace

import pytest
import torch
from planted import Guesser, PlantedModel
from tiny_models import MODELS, VOCABULARY

from statex.evaluation import Request, evaluate, find_suite
from statex.evaluation.context import Context
from statex.evaluation.prompts.needles import score_prompts
from statex.evaluation.reader import Reader
from statex.evaluation.suite import Cell
from statex.evaluation.suites.mqar import cells as mqar_cells
from statex.evaluation.suites.niah_multikey import TASK
from statex.recipe import Evaluation

RECALL = ["mqar", "passkey", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey", "variable_tracking"]
MEMORY = 512
SETTINGS = {
    "batch_size": 3,
    "mqar": {"num_pairs": [2, 8], "num_keys": 16, "num_values": 16, "num_items": 4},
    "passkey": {"lengths": [160, 300], "num_depths": 2, "num_items": 3},
    "niah_single_1": {"lengths": [450], "num_depths": 2, "num_items": 4},
    "niah_single_2": {"lengths": [450], "num_depths": 2, "num_items": 4},
    "niah_single_3": {"lengths": [480], "num_depths": 2, "num_items": 2},
    "niah_multikey": {"lengths": [600], "num_keys": 3, "num_items": 2},
    "variable_tracking": {"lengths": [1500], "num_hops": 2, "num_chains": 2, "num_items": 2},
    "symbol_icl": {"shots": [0, 4, 16], "num_queries": 4, "num_items": 4},
}


@pytest.fixture
def settings():
    return Evaluation.model_validate(SETTINGS | {"suites": RECALL})


def test_a_perfect_copier_scores_1_on_every_recall_suite(tokenizer, source, settings):
    results = evaluate(PlantedModel(VOCABULARY, tokenizer), tokenizer, Request(settings, text=source))
    accuracies = {(row.suite, str(row.slice)): row.value for row in results if row.metric == "accuracy"}
    assert {suite for suite, _ in accuracies} == set(RECALL)
    assert set(accuracies.values()) == {1.0}
    for row in results:
        if row.metric == "answer_nll" and row.suite != "variable_tracking":
            assert row.value < 1e-3


def test_a_perfect_copier_recalls_symbols_and_does_not_generalise(tokenizer, source, settings):
    icl = settings.model_copy(update={"suites": ["symbol_icl"]})
    results = evaluate(PlantedModel(VOCABULARY, tokenizer), tokenizer, Request(icl, text=source))
    found = {(row.slice["shots"], row.slice.get("symbols")): row for row in results}
    assert found[4, "seen"].value == found[16, "seen"].value == 1.0
    assert found[16, "unseen"].value < 0.7
    assert (0, "seen") not in found


def test_a_guesser_scores_at_chance(tokenizer, source, settings):
    many = settings.model_copy(
        update={
            "suites": ["mqar", "passkey", "niah_single_1", "symbol_icl"],
            "mqar": settings.mqar.model_copy(update={"num_items": 100}),
            "symbol_icl": settings.symbol_icl.model_copy(update={"num_items": 12, "num_queries": 8}),
        }
    )
    results = evaluate(Guesser(VOCABULARY), tokenizer, Request(many, text=source))
    chance = {"mqar": 1 / VOCABULARY, "passkey": 0.0, "niah_single_1": 0.0, "symbol_icl": 0.25}
    for row in results:
        if row.metric == "accuracy" and row.suite != "symbol_icl":
            assert row.low <= chance[row.suite] <= row.high, row
    symbols = [row.value for row in results if row.suite == "symbol_icl"]
    assert sum(symbols) / len(symbols) == pytest.approx(0.25, abs=0.06)


def test_memory_of_512_tokens_falls_exactly_where_it_must_on_mqar():
    """T = 1024: a query is answered exactly if its pair is among the last 512 tokens."""
    settings = Evaluation.model_validate(
        {"mqar": {"num_pairs": [256], "num_keys": 256, "num_values": 256, "num_items": 2}}
    )
    from statex.data.recall import mqar_batch
    from statex.evaluation.suites.mqar import vocabulary

    model = PlantedModel(600, memory=MEMORY)
    context = Context(Reader(model), None, settings, None, None)
    ids, labels = mqar_batch([settings.seed, 256], 2, 1024, 256, *vocabulary(context))
    scores = find_suite("mqar").score(context, mqar_cells(context)[0])
    for row, answers, score in zip(ids.tolist(), labels, scores, strict=True):
        queries = (answers != -100).nonzero().flatten().tolist()  # positions of the answers, behind their keys
        near = [row.index(row[place - 1]) >= place - MEMORY for place in queries]
        assert 0 < sum(near) < len(near)
        assert score.scores["accuracy"] == sum(near) / len(near)


@pytest.mark.parametrize("suite", ["passkey", "niah_single_1", "niah_single_2", "niah_multikey"])
def test_memory_of_512_tokens_falls_exactly_where_it_must_on_needles(tokenizer, source, suite):
    """Length 1300: needles at depth 0.875 and 0.9 are within 512 tokens of the answer, those before 0.5 are not."""
    settings = Evaluation.model_validate(
        {
            "suites": [suite],
            "passkey": {"lengths": [1300], "num_depths": 5, "num_items": 2},
            "niah_single_1": {"lengths": [1300], "num_depths": 5, "num_items": 2},
            "niah_single_2": {"lengths": [1300], "num_depths": 5, "num_items": 2},
            "niah_multikey": {"lengths": [1300], "num_keys": 4, "num_items": 2},
        }
    )
    results = evaluate(PlantedModel(VOCABULARY, tokenizer, memory=MEMORY), tokenizer, Request(settings, text=source))
    found = {row.slice["depth"]: row.value for row in results if row.metric == "accuracy" and "depth" in row.slice}
    assert {value for depth, value in found.items() if depth < 0.5} == {0.0}
    assert {value for depth, value in found.items() if depth > 0.8} == {1.0}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_size", [3, 8])
def test_shared_prefill_gives_what_separate_questions_give(name, batch_size, tokenizer, source):
    """Also where questions of several lengths are answered as one batch, which attention's cache does not allow."""
    values = {"batch_size": batch_size, "niah_multikey": {"num_items": 2, "max_new_tokens": 5}}
    reader = Reader(MODELS[name]())
    assert reader.can_batch_states == (name in ("gla", "mamba2"))
    context = Context(reader, tokenizer, Evaluation.model_validate(values), source, source)
    cell = Cell("length-600", {"length": 600})
    prompts = TASK.prompts(context, cell)
    shared = score_prompts(context, cell, prompts, 5)
    separate = [
        score_prompts(context, cell, [replace(prompt, questions=(question, question))], 5)[0]
        for prompt in prompts
        for question in prompt.questions
    ]
    assert len(shared) == 8
    assert len({len(tokenizer(question.text)["input_ids"]) for prompt in prompts for question in prompt.questions}) > 1
    for one, other in zip(shared, separate, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_the_planted_cache_works_like_a_real_one(tokenizer):
    reader = Reader(PlantedModel(VOCABULARY))
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    logits, state = reader.read(ids.tolist())
    assert logits.argmax() == 7
    logits, _ = reader.read([[7], [6]], reader.copy_state(state, [0, 0]))
    assert logits.argmax(dim=1).tolist() == [5, 6]
