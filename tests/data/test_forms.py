"""Recall in words: what a text states and asks, its length, its labels, and how training mixes it in."""

import itertools
import re

import numpy as np
import pytest
import torch

from prefix_space import make_tokenizer
from statex.data.forms import FORMS, FormBuilder, form_batch
from statex.data.mixture import KINDS, TrainingBatches
from statex.errors import UserError
from statex.evaluation.suites.recall_forms import NAMES
from statex.recipe import Training, Weights
from statex.settings import Forms

STATED = {  # what the answer to a question must stand behind, in the text before all questions
    "phone_book": lambda question: question.removeprefix("The number of ").removesuffix(" is") + ":",
    "facts": lambda question: re.sub(r"What is the colour of (.*)'s (.*)\? It is", r"The \2 of \1 is", question),
    "needles": lambda question: question,
    "copy_words": lambda question: "The code words are",
}


@pytest.fixture(params=["bytes", "prefix space"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "bytes" else make_tokenizer("always")


def test_every_form_has_a_weight_and_is_asked():
    assert tuple(FORMS) == NAMES
    assert tuple(Weights.model_fields) == KINDS


@pytest.mark.parametrize("name", FORMS)
def test_every_answer_was_stated(name, tokenizer):
    builder, generator = FormBuilder(tokenizer, name, 3), np.random.default_rng(1)
    for _ in range(5):
        item = builder.build(generator, 600)
        text = tokenizer.decode(item.ids).replace("<|endoftext|>", "")
        count = min(3, item.num_facts)
        body, *questions = text.rsplit("\n", count)
        assert len(questions) == count
        for number, asked in enumerate(questions):
            answer = tokenizer.decode(item.ids[item.question == number])
            assert asked.endswith(f"{answer}.")
            assert f"{STATED[name](asked.removesuffix(f'{answer}.'))}{answer}" in body


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [400, 1000])
def test_the_length_is_met_and_answers_are_marked(name, length, any_tokenizer):
    item = FormBuilder(any_tokenizer, name, 2).build(np.random.default_rng(0), length)
    assert item.ids.shape == item.question.shape == (length,)
    used = length - np.argmax(item.ids[::-1] != any_tokenizer.eos_token_id)
    assert used > 0.9 * length
    assert set(item.question.tolist()) == {-1, *range(min(2, item.num_facts))}
    if name == "phone_book" and length == 1000:
        assert item.num_facts > FormBuilder(any_tokenizer, name, 2).build(np.random.default_rng(0), 400).num_facts


def test_short_texts_hide_fewer_needles(tokenizer):
    builder = FormBuilder(tokenizer, "needles", 4)
    counts = [builder.build(np.random.default_rng(0), length).num_facts for length in (90, 150, 220, 1000)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"length = 20: has no room for a text of the form needles, which takes"):
        FormBuilder(tokenizer, "needles", 2).build(np.random.default_rng(0), 20)
    with pytest.raises(UserError, match="use one of phone_book, facts"):
        FormBuilder(tokenizer, "poems", 2)


def test_only_answers_have_labels(tokenizer):
    builder = FormBuilder(tokenizer, "facts", 4)
    ids, labels = form_batch(np.random.default_rng(0), 3, 512, builder)
    scored = labels != -100
    assert torch.equal(ids[scored], labels[scored])
    assert 0 < scored.float().mean() < 0.3


def training(**weights):
    values = {"steps": 50, "warmup_steps": 1, "tokens_per_step": 2048, "sequence_length": 512}
    return Training.model_validate(values | {"weights": {"text": 0} | weights})


def test_training_mixes_forms_of_several_lengths(data, tokenizer):
    mixed = data.model_copy(update={"forms": Forms(lengths=[400, 512])})
    settings = training(facts=1, needles=1, mqar=1)
    batches = TrainingBatches(mixed, settings, tokenizer)
    kinds = [batches.kind_of_step(step) for step in range(24)]
    assert set(kinds) == {"facts", "needles", "mqar"}
    found = list(itertools.islice(batches, 24))
    shapes = {tuple(batch["input_ids"].shape) for kind, batch in zip(kinds, found, strict=True) if kind != "mqar"}
    assert shapes == {(5, 400), (4, 512)}
    resumed = TrainingBatches(mixed, settings, tokenizer, start_step=20)
    for one, other in zip(found[20:], resumed, strict=False):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_weights_that_are_0_change_no_draw(data, tokenizer):
    """A recipe of before has the steps that it had."""
    batches = TrainingBatches(data, training(text=0, mqar=3, passkey=1), tokenizer)
    generator = np.random.default_rng([batches.data.seed, 0, 0])
    wanted = generator.choice(3, size=1024, p=[0, 0.75, 0.25])
    assert [batches.kind_of_step(step) for step in range(100)] == [KINDS[index] for index in wanted[:100]]


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"lengths": [16]}, r"data\.forms\.lengths = 16: has no room"),
        ({"lengths": [4096]}, r"data\.forms\.lengths = 4096: tokens_per_step gives fewer texts than"),
    ],
)
def test_lengths_that_do_not_fit_fail_at_once(data, tokenizer, forms, message):
    with pytest.raises(UserError, match=message):
        TrainingBatches(data.model_copy(update={"forms": Forms(**forms)}), training(facts=1), tokenizer)
