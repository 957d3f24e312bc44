import numpy as np
import pytest
from transformers import AutoTokenizer

from statex.data.tokenizer import key_token, recall_vocabulary, train_tokenizer, value_token
from statex.errors import UserError
from statex.settings import Recall, Tokenizer


def test_vocabulary_layout(tokenizer, data):
    assert len(tokenizer) == data.tokenizer.vocab_size == 320
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.convert_tokens_to_ids([key_token(0), value_token(15)]) == [320 - 32, 319]


def test_any_text_survives(tokenizer):
    text = "Things of 42 — naïve ☃\n\tdef f(x):  return x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 320 - 32


def test_training_is_deterministic(tokenizer, data):
    again = train_tokenizer(data.text, data.tokenizer, data.recall)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_training_reads_at_most_training_bytes(data):
    little = Tokenizer(vocab_size=300, training_bytes=50)
    few_keys = Recall(num_keys=4, num_values=4, shapes=[(16, 4)])
    assert len(train_tokenizer(data.text, little, few_keys)) == 300


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Document 3 tells of things."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token_id == 0
    for before, after in zip(recall_vocabulary(tokenizer, 16, 16), recall_vocabulary(loaded, 16, 16), strict=True):
        assert (before == after).all()


def test_reserved_recall_ids(tokenizer):
    keys, values = recall_vocabulary(tokenizer, 8, 16)
    assert keys.tolist() == list(range(288, 296))
    assert values.tolist() == list(range(304, 320))


@pytest.mark.parametrize(("num_keys", "num_values"), [(8, 8), (3, 40), (75, 75), (1, 1)])
def test_ordinary_recall_ids_are_disjoint_spread_and_no_special_tokens(foreign_tokenizer, num_keys, num_values):
    keys, values = recall_vocabulary(foreign_tokenizer, num_keys, num_values)
    assert (len(keys), len(values)) == (num_keys, num_values)
    both = np.concatenate([keys, values])
    assert len(set(both)) == num_keys + num_values
    assert 0 not in both
    again = recall_vocabulary(foreign_tokenizer, num_keys, num_values)
    assert (keys == again[0]).all()
    assert (values == again[1]).all()
    if num_keys > 1:
        assert keys.max() - keys.min() > 80


def test_too_small_vocabularies(tokenizer, foreign_tokenizer, data):
    with pytest.raises(UserError, match=r"num_keys = 17: the tokenizer has only 16 reserved tokens for it"):
        recall_vocabulary(tokenizer, 17, 16)
    with pytest.raises(UserError, match="more than the 150 ordinary tokens"):
        recall_vocabulary(foreign_tokenizer, 100, 64)
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size = 300: .* need 385"):
        train_tokenizer(data.text, Tokenizer(vocab_size=300), Recall())
    with pytest.raises(UserError, match=r"the text gives a vocabulary of \d+ only; lower it"):
        train_tokenizer(data.text, Tokenizer(vocab_size=5000), data.recall)
