import numpy as np
import pytest
import torch

from prefix_space import KINDS, make_tokenizer
from statex.data.recall import FILLER, PasskeyBuilder, mqar_batch, passkey_batch, random_passkey
from statex.errors import UserError

KEYS, VALUES = np.arange(100, 120), np.arange(200, 240)


@pytest.mark.parametrize(("length", "num_pairs"), [(16, 4), (64, 16), (40, 4), (43, 10), (256, 20)])
def test_every_query_was_defined_once_and_its_answer_is_right(length, num_pairs):
    ids, labels = mqar_batch(0, 50, length, num_pairs, KEYS, VALUES)
    assert ids.shape == labels.shape == (50, length)
    assert ids.dtype == labels.dtype == torch.int64
    for row, marks in zip(ids.tolist(), labels.tolist(), strict=True):
        keys, values = row[0 : 2 * num_pairs : 2], row[1 : 2 * num_pairs : 2]
        assert set(keys) <= set(KEYS)
        assert set(values) <= set(VALUES)
        assert len(set(keys)) == len(set(values)) == num_pairs
        pairs = dict(zip(keys, values, strict=True))
        answers = [t for t in range(length) if marks[t] != -100]
        assert all(t >= 2 * num_pairs + 1 and pairs[row[t - 1]] == row[t] == marks[t] for t in answers)
        assert sorted(row[t - 1] for t in answers) == sorted(keys)  # each pair is asked for once
        others = set(range(2 * num_pairs, length)) - set(answers) - {t - 1 for t in answers}
        assert all(row[t] in VALUES for t in others)  # no key outside pairs and queries


def test_the_dense_form_has_queries_everywhere():
    ids, labels = mqar_batch(0, 8, 32, 8, KEYS, VALUES)
    assert (labels[:, 17::2] == ids[:, 17::2]).all()
    assert (labels[:, :16] == -100).all()
    assert (labels[:, 16::2] == -100).all()


def test_queries_come_at_power_law_gaps():
    _, labels = mqar_batch(0, 4000, 256, 1, KEYS, VALUES)
    gaps = (labels != -100).float().argmax(dim=1) // 2 - 1
    near, far = (gaps < 4).float().mean(), (gaps >= 64).float().mean()
    assert near == pytest.approx(0.38, abs=0.03)  # the sum of 1/g over the first 4 of 127 gaps, with Zoology's power
    assert far == pytest.approx(0.13, abs=0.03)


def test_mqar_follows_its_seed():
    first, again, other = (mqar_batch([3, seed], 4, 32, 8, KEYS, VALUES)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    generator = np.random.default_rng(0)
    from_generator = [mqar_batch(generator, 4, 32, 8, KEYS, VALUES)[0] for _ in range(2)]
    assert not torch.equal(*from_generator)


@pytest.mark.parametrize(("length", "num_pairs"), [(16, 5), (16, 0), (200, 21)])
def test_pairs_that_do_not_fit(length, num_pairs):
    with pytest.raises(UserError, match="num_pairs"):
        mqar_batch(0, 1, length, num_pairs, KEYS, VALUES)


@pytest.mark.parametrize("length", [150, 151, 400, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_passkey_has_the_exact_length_and_depth(tokenizer, length, depth):
    builder = PasskeyBuilder(tokenizer)
    item = builder.build(length, depth, "31415")
    assert len(item.prompt_ids) + len(item.answer_ids) == item.num_tokens == length
    text = tokenizer.decode(item.prompt_ids)
    assert text.count("The passkey is 31415. Remember it. 31415 is the passkey.") == 1
    assert text.endswith("What is the pass key? The passkey is")
    assert tokenizer.decode(item.answer_ids) == " 31415"
    longest = max(len(tokenizer(f" {sentence}")["input_ids"]) for sentence in FILLER)
    assert abs(item.depth - depth) * length <= longest  # moved by a sentence at most
    before, after = text.split(" The passkey is 31415. Remember it. 31415 is the passkey.")
    assert not before or before.endswith(".")
    rest = after.removesuffix(" What is the pass key? The passkey is")
    assert not before or rest in " " + " ".join(FILLER * 100)
    num_before = len(tokenizer(before)["input_ids"])
    num_filler = num_before + len(tokenizer(rest)["input_ids"])
    assert num_before / num_filler == pytest.approx(item.depth, abs=3 / num_filler)  # a word may be cut at the begin


@pytest.mark.parametrize("kind", KINDS)
def test_passkey_is_text_to_a_tokenizer_that_puts_a_space_before_each(kind):
    """Its tokens are those of the whole text: "is 98210. Remember", not "is  98210 . Remember"."""
    tokenizer = make_tokenizer(kind)
    builder = PasskeyBuilder(tokenizer)
    smallest = builder.build(builder.min_length, 0.5, "98210").num_tokens
    for length in range(smallest, smallest + 2 * len(builder.cycle)):
        item = builder.build(length, 0.5, "98210")
        assert item.num_tokens == length
        text = tokenizer.decode(item.prompt_ids, skip_special_tokens=True)
        assert "The passkey is 98210. Remember it. 98210 is the passkey. " in text
        assert "  " not in text
        if text.startswith("The"):  # else a word of the filler is cut, which would be tokenised in another way
            assert tokenizer(text)["input_ids"] == item.prompt_ids
            assert tokenizer(f"{text} 98210")["input_ids"] == item.prompt_ids + item.answer_ids


def test_passkey_that_is_too_short(tokenizer):
    builder = PasskeyBuilder(tokenizer)
    with pytest.raises(UserError, match=r"length = 20: is too short .* give at least \d+ tokens") as raised:
        builder.build(20, 0.5, "12345")
    needed = int(raised.value.remedy.split()[-2])
    assert needed <= builder.min_length
    assert builder.build(needed, 0.5, "12345").num_tokens == needed
    with pytest.raises(UserError, match="depth"):
        builder.build(1000, 1.5, "12345")


def test_passkey_keeps_a_bos_that_the_tokenizer_puts_before_texts(tokenizer):
    from tokenizers import processors

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    with_bos = type(tokenizer)(tokenizer_object=backend, bos_token="<|endoftext|>")
    item = PasskeyBuilder(with_bos).build(200, 0.5, "12345")
    assert item.num_tokens == 200
    assert item.prompt_ids[0] == 0
    assert 0 not in item.prompt_ids[1:] + item.answer_ids


def test_passkey_batches_label_the_answer_only(tokenizer):
    ids, labels = passkey_batch(5, 6, 200, PasskeyBuilder(tokenizer))
    assert ids.shape == labels.shape == (6, 200)
    for row, marks in zip(ids, labels, strict=True):
        answer = tokenizer.decode(row[marks != -100])
        assert answer.strip().isdigit()
        assert tokenizer.decode(row).count(answer) == 3
        assert torch.equal(row[marks != -100], row[-int((marks != -100).sum()) :])
    assert torch.equal(ids, passkey_batch(5, 6, 200, PasskeyBuilder(tokenizer))[0])


def test_random_passkeys_have_five_digits():
    generator = np.random.default_rng(0)
    assert all(len(random_passkey(generator)) == 5 for _ in range(100))
