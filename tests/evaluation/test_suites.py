"""What the suites ask: hits, ranges, lengths, symbols, and that every model is asked the same."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, make_gla, make_llama, make_mamba2

import statex
from statex.errors import UserError
from statex.evaluation import Request, evaluate, find_suite
from statex.evaluation.context import Context
from statex.evaluation.prompts.grids import default_lengths
from statex.evaluation.prompts.haystack import LONGEST_SENTENCE, split_sentences, text_haystack
from statex.evaluation.prompts.needles import num_tokens
from statex.evaluation.reader import Reader
from statex.evaluation.records import digest_of
from statex.evaluation.suite import Cell
from statex.evaluation.suites.ar_hits import find_hits
from statex.evaluation.suites.nll_by_position import position_ranges
from statex.evaluation.suites.symbol_icl import build_task
from statex.evaluation.text.count_table import CountTable, count_table, default_ngram, ngram_keys
from statex.evaluation.text.windows import held_out_windows
from statex.recipe import Evaluation
from statex.results.suites import HARNESS_GROUPS, SUITES, result_name, split_names, task_name
from statex.settings import TextSource

NAMES = [
    "passkey", "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey", "variable_tracking", "mqar",
    "ar_hits", "nll_by_position", "symbol_icl", "recall_forms", "cost",
]  # fmt: skip


@pytest.fixture
def context(tokenizer, source):
    return Context(Reader(make_gla()), tokenizer, Evaluation(), source, source)


def test_the_suites_have_their_names():
    assert set(SUITES) == set(NAMES)
    assert set(split_names(["offline"])[0]) == set(NAMES)
    assert all(find_suite(name).name == name for name in NAMES)


def test_names_are_ours_or_lm_evals():
    names = ["piqa", "mqar", "common-sense", "niah_single_1", "lm_eval_niah_single_1", "offline"]
    ours, tasks = split_names(names)
    assert ours[:2] == ["mqar", "niah_single_1"]
    assert set(ours) == set(NAMES)
    assert tasks == [*HARNESS_GROUPS["common-sense"], "niah_single_1"]
    for task in HARNESS_GROUPS["long-context"]:
        assert result_name(task) not in SUITES
        assert task_name(result_name(task)) == task


def table_of(counts, vocab_size=10, ngram=2):
    keys = sorted(counts)
    return CountTable(np.array(keys), np.array([counts[key] for key in keys]), vocab_size, ngram, 100)


def test_hits_are_repeated_and_rare():
    ids = np.array([1, 2, 3, 1, 2, 4, 1, 2])  # the bigram (1, 2) comes back twice, (2, 3) never
    hits, gaps = find_hits(ids, table_of({12: 1}), theta=1)
    assert hits.tolist() == [False, False, False, True, False, False, True]
    assert gaps[[3, 6]].tolist() == [3, 3]
    assert not find_hits(ids, table_of({12: 1}), theta=0)[0].any()


def test_the_first_tokens_end_no_ngram():
    ids = np.array([1, 2, 3, 1, 2, 3])
    hits, _ = find_hits(ids, table_of({}, ngram=3), theta=0)
    assert hits.tolist() == [False, False, False, False, True]


def test_ngrams_that_do_not_fit_64_bits_are_refused():
    with pytest.raises(UserError, match="use 2 or 3"):
        ngram_keys(np.array([1, 2, 3, 4]), 4, 250_000)
    assert [default_ngram(size) for size in (512, 2048, 50_000)] == [4, 3, 2]


def test_the_count_table_is_kept_and_read_again(context, tmp_path, monkeypatch):
    shared = replace(context, shared=tmp_path)
    monkeypatch.setattr("statex.evaluation.text.count_table._tables", {})
    first = count_table(shared, None, 2000)
    assert first.num_tokens == 2000
    assert first.counts.sum() > 0
    monkeypatch.setattr("statex.evaluation.text.count_table._tables", {})
    monkeypatch.setattr("statex.evaluation.text.count_table.count_ngrams", None)
    assert count_table(shared, None, 2000).digest == first.digest


def test_position_ranges_double_and_end_at_the_training_length():
    assert position_ranges(128) == [(0, 32), (32, 64), (64, 128)]
    assert position_ranges(200, training_length=128) == [(0, 25), (25, 50), (50, 100), (100, 128), (128, 200)]


def test_windows_are_of_all_documents_before_second_ones(context):
    settings = context.evaluation.nll_by_position.model_copy(update={"length": 100, "num_windows": 1000})
    windows = held_out_windows(context, "nll_by_position", settings, None)
    documents = {window.document for window in windows}
    assert len({window.document for window in windows[: len(documents)]}) == len(documents)
    assert len(windows) > len(documents)
    assert all(len(window.ids) == 101 for window in windows)


def prompts_of(context, suite, cell):
    return importlib.import_module(f"statex.evaluation.suites.{suite}").TASK.prompts(context, cell)


@pytest.mark.parametrize("suite", ["niah_single_1", "niah_single_2", "niah_single_3"])
@pytest.mark.parametrize("length", [400, 900])
def test_prompts_have_the_length_that_was_asked(context, suite, length):
    settings = Evaluation.model_validate({suite: {"num_items": 5}})
    asked = replace(context, evaluation=settings)
    prompts = prompts_of(asked, suite, Cell("", {"length": length, "depth": 0.5}))
    sizes = [num_tokens(context.tokenizer, prompt) for prompt in prompts]
    slack = 80 if suite == "niah_single_1" else 30  # a line of noise, some words of text
    assert all(length - slack <= size <= length for size in sizes), sizes
    assert len({prompt.context for prompt in prompts}) == 5


def test_a_length_without_room_is_refused(context):
    with pytest.raises(UserError, match="too short for the needles"):
        prompts_of(context, "niah_single_1", Cell("", {"length": 100, "depth": 0.5}))


def test_a_text_too_short_for_a_length_is_refused(context):
    with pytest.raises(UserError, match="too short a haystack"):
        prompts_of(context, "niah_single_2", Cell("", {"length": 200_000, "depth": 0.5}))


def test_default_lengths_fit_the_question_and_the_model(tokenizer, source):
    llama = Context(Reader(make_llama()), tokenizer, Evaluation(), source, source, limit=160)
    with pytest.raises(UserError, match="no default length that model and text allow has room"):
        find_suite("niah_single_1").cells(llama)
    gla = replace(llama, reader=Reader(make_gla()), limit=None)
    assert {cell.slice["length"] for cell in find_suite("niah_single_1").cells(gla)} == {512, 1024, 2048}


def test_a_prompt_may_be_as_long_as_attention_reads(tokenizer, source, monkeypatch):
    """A length counts the answer, and not what else the model may say: that ends where attention does."""
    told = {"num_depths": 2, "num_items": 2, "max_new_tokens": 128}
    settings = Evaluation.model_validate({"niah_single_1": told | {"lengths": [600]}, "batch_size": 3})
    read, said = [], []
    reader = Reader(make_gla())
    forward, generate = reader._forward, reader.generate

    def counted(ids, state, **options):
        read.append(ids.shape[1] + (state.num_tokens if state is not None else 0))
        return forward(ids, state, **options)

    def generated(*arguments):
        rows = generate(*arguments)
        said.extend(len(row) for row in rows)
        return rows

    monkeypatch.setattr(reader, "_forward", counted)
    monkeypatch.setattr(reader, "generate", generated)
    context = Context(reader, tokenizer, settings, source, source)
    suite = find_suite("niah_single_1")
    for limit in (600, None):
        read.clear()
        said.clear()
        limited = replace(context, limit=limit)
        suite.check(limited)
        for cell in suite.cells(limited):
            assert all("accuracy" in score.scores for score in suite.score(limited, cell))
        assert len(said) == 4
        if limit is None:
            assert said == [128] * 4
        else:
            assert max(read) < limit + 7  # of the longest prompt, with another one's longer answer
            assert all(7 <= count < 128 for count in said)  # seven digits, a token each or fewer
    with pytest.raises(UserError, match=r"evaluation\.niah_single_1\.lengths = 600: is more than the 599 tokens"):
        suite.check(replace(context, limit=599))


@pytest.mark.parametrize("make", [make_gla, make_mamba2])
def test_default_lengths_are_those_of_the_model_before_its_expansion(make, monkeypatch):
    """Or an arm that the expansion makes bigger than a border would be asked something else."""
    model = make()
    monkeypatch.setattr(
        "statex.evaluation.prompts.grids.CPU_DEFAULT_LENGTHS", {model.num_parameters(): (2,), 1e9: (1,)}
    )
    statex.expand(model, statex.ExpansionConfig(every=1, factor=2, init="preserve"))
    assert default_lengths(Reader(model)) == (2,)


def test_default_lengths_are_those_that_the_text_fills(tokenizer, tmp_path):
    for number in range(8):  # 120 letters each, about as many of this tokenizer's tokens
        (tmp_path / f"{number}.txt").write_text(f"short text {number}. " * 8)
    source = TextSource(files=[str(tmp_path / "*.txt")], held_out=0.9)
    context = Context(Reader(make_gla()), tokenizer, Evaluation(), source, source)
    assert {cell.slice["length"] for cell in find_suite("niah_single_2").cells(context)} == {512}
    with pytest.raises(
        UserError, match="no default length that model and text allow has room"
    ):  # four needles need more room
        find_suite("niah_multikey").cells(context)


def test_sentences_are_short_and_lose_nothing():
    text = "One two.  Three\nfour! " + "word " * 50
    sentences = split_sentences(text)
    assert " ".join(sentences).split() == text.split()
    assert max(len(sentence.split()) for sentence in sentences) <= LONGEST_SENTENCE


def test_a_haystack_begins_at_different_places(context):
    haystack = text_haystack(context, 500)
    generator = np.random.default_rng(0)
    assert len({haystack.take(generator, 200)[0] for _ in range(20)}) > 5


@pytest.mark.parametrize("suite", ["niah_single_2", "niah_single_3", "niah_multikey"])
def test_items_do_not_depend_on_what_was_asked_before(context, suite, monkeypatch):
    """As where several models are measured in one process, or a run resumes in another."""
    monkeypatch.setattr("statex.evaluation.prompts.haystack._texts", {})
    short, long = (Cell("", {"length": length, "depth": 0.5}) for length in (700, 2000))

    def texts(cell):
        return [prompt.context for prompt in prompts_of(context, suite, cell)]

    first = texts(short)
    texts(long)
    assert texts(short) == first


def test_recall_in_words_is_scored_answer_by_answer(context, monkeypatch):
    settings = Evaluation.model_validate({"recall_forms": {"num_items": 6, "lengths": [600], "num_questions": 3}})
    asked, suite, read = replace(context, evaluation=settings), find_suite("recall_forms"), context.reader.score
    known = {"facts", "copy_words"}  # of whose answers the model is sure

    def knowing(ids, targets, state=None):
        nll, right = read(ids, targets, state)
        return nll, torch.full_like(right, cell.slice["form"] in known)

    monkeypatch.setattr(context.reader, "score", knowing)
    cells = suite.cells(asked)
    assert [cell.slice["form"] for cell in cells] == settings.recall_forms.forms
    for cell in cells:
        scores = suite.score(asked, cell)
        assert {score.scores["accuracy"] for score in scores} == {float(cell.slice["form"] in known)}
        assert len({score.digest for score in scores}) == 6
        assert all(score.scores["answer_nll"] > 0 for score in scores)


def test_symbols_are_labelled_by_their_first_syllable_and_unseen_ones_never_shown():
    generator = np.random.default_rng(0)
    task = build_task(generator, 4, 512)
    assert all(task.labels[symbol[:3]] == label for symbol, label in task.examples)
    shown = {symbol for symbol, _ in task.examples}
    queries = task.queries(generator, 512, 20)
    assert {kind: sum(1 for one in queries if one[0] == kind) for kind in ("seen", "unseen")} == {
        "seen": 20,
        "unseen": 20,
    }
    assert all((symbol in shown) == (kind == "seen") for kind, symbol, _ in queries)
    assert all(task.labels[symbol[:3]] == label for _, symbol, label in queries)
    assert {kind for kind, _, _ in task.queries(generator, 0, 3)} == {"unseen"}


def test_default_shots_are_those_that_the_model_can_read(tokenizer, source):
    settings = Evaluation.model_validate({"symbol_icl": {"num_items": 2, "num_queries": 1}})
    suite = find_suite("symbol_icl")

    def asked(limit, **changes):
        evaluation = settings.model_copy(update={"symbol_icl": settings.symbol_icl.model_copy(update=changes)})
        context = Context(Reader(make_gla()), tokenizer, evaluation, source, source, limit=limit)
        suite.check(context)
        return {score.item: score for score in suite.score(context, suite.cells(context)[0])}

    few, more = asked(160), asked(400)
    assert {score.slice["shots"] for score in few.values()} < {score.slice["shots"] for score in more.values()}
    assert max(score.measured["tokens"] for score in few.values()) <= 160
    assert few == {item: more[item] for item in few}
    with pytest.raises(UserError, match=r"symbol_icl.shots = 512: takes \d+ tokens, more than the 160"):
        asked(160, shots=[0, 512])
    with pytest.raises(UserError, match=r"symbol_icl.shots = 0: takes \d+ tokens, more than the 3"):
        asked(3)


def test_two_models_are_asked_the_same_and_another_seed_something_else(tokenizer, source):
    def hashes(model, seed):
        settings = Evaluation.model_validate(
            {
                "seed": seed,
                "mqar": {"num_pairs": [2], "num_keys": 16, "num_values": 16, "num_items": 3},
                "passkey": {"lengths": [150], "num_depths": 1, "num_items": 3},
                "niah_single_2": {"lengths": [450], "num_depths": 1, "num_items": 2, "max_new_tokens": 2},
                "symbol_icl": {"shots": [4], "num_items": 1},
            }
        )
        context = Context(Reader(model), tokenizer, settings, source, source)
        suites = [find_suite(name) for name in ("mqar", "passkey", "niah_single_2", "symbol_icl")]
        return [digest_of(suite.score(context, suite.cells(context)[0])) for suite in suites]

    first = hashes(make_gla(), 0)
    assert hashes(make_mamba2(), 0) == first
    assert all(one != other for one, other in zip(hashes(make_gla(), 1), first, strict=True))


def test_cost_is_measured_and_not_compared(tokenizer, source):
    settings = Evaluation.model_validate(
        {"suites": ["cost"], "cost": {"lengths": [64], "batch_sizes": [1, 2], "decode_tokens": 4, "repetitions": 3}}
    )
    model = make_gla()
    found = {(row.metric, str(row.slice)): row for row in evaluate(model, tokenizer, Request(settings, text=source))}
    assert found["parameters", "{'batch_size': 1}"].value == sum(p.numel() for p in model.parameters())
    assert found["state_bytes", "{'batch_size': 1}"].value > 4 * 2 * 2 * 8 * 16  # matrix states, and convolutions
    assert found["prefill_tokens_per_second", "{'length': 64}"].n == 3
    assert found["decode_ms_per_token", "{'batch_size': 2}"].value > 0
    assert found["peak_memory", "{'length': 64}"].value > 0
    assert not find_suite("cost").paired


def test_a_vocabulary_too_small_for_mqar_is_refused():
    settings = Evaluation.model_validate({"suites": ["mqar"], "mqar": {"num_keys": VOCABULARY, "num_values": 40}})
    with pytest.raises(UserError, match="lower num_keys"):
        evaluate(make_gla(), None, Request(settings))


def test_a_text_without_held_out_documents_is_refused(tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("a text")
    source = TextSource(files=[str(tmp_path / "*.txt")], held_out=1e-9)
    with pytest.raises(UserError, match="held_out"):
        evaluate(make_gla(), tokenizer, Request(Evaluation(suites=["nll_by_position"]), text=source))
