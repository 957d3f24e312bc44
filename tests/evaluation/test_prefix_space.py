"""Prompts as a tokenizer sees them that puts a space before each text: tokenised whole, then split as lm-eval does."""

import numpy as np
import pytest
from planted import PlantedModel

from prefix_space import KINDS, VOCAB_SIZE, make_tokenizer
from statex.evaluation import find_suite
from statex.evaluation.context import Context
from statex.evaluation.prompts.needles import answer_text
from statex.evaluation.reader import Reader
from statex.evaluation.suites import niah_multikey, niah_single_2, variable_tracking
from statex.evaluation.suites.symbol_icl import QUERY, build_task
from statex.recipe import Evaluation

pytest.importorskip("lm_eval")

from statex.evaluation.lm_eval.model import StateLM

LENGTH = 850
NEEDLES = {module.TASK.name: module.TASK for module in (niah_single_2, niah_multikey, variable_tracking)}


class Recorder(PlantedModel):
    """Keeps all that it was asked to continue."""

    def __init__(self, tokenizer):
        super().__init__(VOCAB_SIZE, tokenizer)
        self.seen = set()

    def predict(self, tokens):
        self.seen.add(tuple(tokens))
        return super().predict(tokens)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return make_tokenizer(request.param)


@pytest.fixture
def context(tokenizer, source):
    lengths = {"lengths": [LENGTH], "num_items": 1}
    values = {"niah_single_2": lengths | {"num_depths": 1}, "niah_multikey": lengths | {"num_keys": 2}}
    values["variable_tracking"] = lengths | {"num_chains": 2, "num_hops": 1}
    values["symbol_icl"] = {"shots": [0, 1, 3, 9], "num_items": 1, "num_queries": 2}
    return Context(Reader(Recorder(tokenizer)), tokenizer, Evaluation.model_validate(values), source, source)


@pytest.mark.parametrize("suite", NEEDLES)
def test_needles(context, suite):
    model, lm_eval = context.reader.model, StateLM(context.reader, context.tokenizer, batch_size=1)
    (cell,) = find_suite(suite).cells(context)
    scores = find_suite(suite).score(context, cell)
    for prompt in NEEDLES[suite].prompts(context, cell):
        for question in prompt.questions:
            asked, answer = lm_eval._encode_pair(prompt.context + question.text, answer_text(question))
            assert tuple(asked) in model.seen
            assert tuple(asked + answer[:-1]) in model.seen
            assert "  " not in context.tokenizer.decode(asked + answer)
    assert {score.scores["accuracy"] for score in scores} == {1.0}
    assert max(score.scores["answer_nll"] for score in scores) < 1e-3
    assert max(score.measured["tokens"] for score in scores) <= LENGTH


def test_symbols(context):
    settings, model = context.evaluation.symbol_icl, context.reader.model
    lm_eval = StateLM(context.reader, context.tokenizer, batch_size=1)
    (cell,) = find_suite("symbol_icl").cells(context)
    scores = find_suite("symbol_icl").score(context, cell)
    generator = np.random.default_rng([context.evaluation.seed, 0])
    task = build_task(generator, settings.num_labels, max(settings.shots))
    for shots in settings.shots:
        shown = "\n" + "".join(f"{symbol} is {label}\n" for symbol, label in task.examples[:shots])
        for _, symbol, _ in task.queries(generator, shots, settings.num_queries):
            for label in set(task.labels.values()):
                asked, answer = lm_eval._encode_pair(shown + QUERY.format(symbol=symbol), f" {label}")
                assert tuple(asked + answer[:-1]) in model.seen
    seen = [score.scores["accuracy"] for score in scores if score.slice["symbols"] == "seen"]
    assert np.mean(seen) == 1.0
