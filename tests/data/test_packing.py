import itertools

import numpy as np
import pytest

from statex.data.documents import open_documents
from statex.data.packing import DocumentEncoder, check_text, pack, text_sequences
from statex.errors import UserError


def test_packing_loses_and_adds_no_token():
    generator = np.random.default_rng(0)
    documents = [np.arange(n) + 1000 * i for i, n in enumerate(generator.integers(0, 40, size=100))]
    stream = np.concatenate(documents)
    packed = list(pack(documents, 16))
    assert len(packed) == len(stream) // 16
    assert (np.concatenate([sequence.input_ids for sequence in packed]) == stream[: 16 * len(packed)]).all()


def test_borders_are_where_documents_begin():
    packed = list(pack([np.array([1, 1, 0]), np.array([2, 0]), np.array([3] * 6 + [0])], 4))
    assert [sequence.input_ids.tolist() for sequence in packed] == [[1, 1, 0, 2], [0, 3, 3, 3], [3, 3, 3, 0]]
    assert [sequence.seq_idx.tolist() for sequence in packed] == [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert packed[0].seq_idx.dtype == np.int32


def test_an_epoch_holds_each_document_once_with_its_end(data, tokenizer):
    encode = DocumentEncoder(tokenizer)
    wanted = sorted(ids.tobytes() for ids in encode(open_documents(data.text)))
    num_tokens = sum(len(ids) for ids in encode(open_documents(data.text)))
    orders = []
    stream = text_sequences(data, tokenizer, 1)
    for _ in range(2):
        tokens = np.concatenate([next(stream).input_ids for _ in range(num_tokens)])
        assert tokens[-1] == tokenizer.eos_token_id
        ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
        documents = [piece.tobytes() for piece in np.split(tokens, ends)[:-1]]
        assert sorted(documents) == wanted
        orders.append(documents)
    assert orders[0] != orders[1]


def test_any_start_is_found_again_over_several_epochs(data, tokenizer):
    T = 333
    num_tokens = sum(len(ids) for ids in DocumentEncoder(tokenizer)(open_documents(data.text)))
    count = 4 * num_tokens // T
    whole = list(itertools.islice(text_sequences(data, tokenizer, T), count))
    for start in (0, 1, num_tokens // T, num_tokens // T + 1, 2 * num_tokens // T, count - 1):
        found = next(text_sequences(data, tokenizer, T, start=start))
        assert (found.input_ids == whole[start].input_ids).all()
        assert (found.seq_idx == whole[start].seq_idx).all()


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    documents = [{"text": "a <|endoftext|> b <|key_0|>"}]
    (ids,) = DocumentEncoder(tokenizer)(documents)
    assert (ids == 0).sum() == 1
    assert ids[-1] == 0
    assert ids.max() < 288
    assert tokenizer.decode(ids[:-1]) == documents[0]["text"]
    assert tokenizer("<|endoftext|>")["input_ids"] == [0]  # the caller's tokenizer is as it was


def test_truncation_left_on_in_the_tokenizer_does_not_cut_documents(tokenizer):
    tokenizer(["a b c d e f"], truncation=True, max_length=2)
    (ids,) = DocumentEncoder(tokenizer)([{"text": "a b c d e f"}])
    assert len(ids) > 6


def test_text_shorter_than_a_sequence(data, tokenizer):
    with pytest.raises(UserError, match=r"training\.sequence_length = 1000000: .* shorten it or give more text"):
        check_text(data, tokenizer, 1_000_000)
    with pytest.raises(UserError, match="is longer than the whole training text"):
        next(text_sequences(data, tokenizer, 1_000_000, start=3))


def test_tokenizers_that_cannot_pack(tokenizer):
    class Slow:
        eos_token_id, name_or_path = 0, "slow"

    with pytest.raises(UserError, match="is not a fast tokenizer"):
        DocumentEncoder(Slow())
    without_end = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="has no eos_token"):
        DocumentEncoder(without_end)
