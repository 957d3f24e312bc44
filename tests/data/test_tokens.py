"""Prepared tokens: what is written, read, resumed, and noticed when it is damaged."""

import json
import os
import signal
from pathlib import Path
from unittest import mock

import aiohttp
import datasets
import numpy as np
import pytest
import requests
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from commands import run
from statex.data import tokens
from statex.data.documents import open_documents
from statex.data.encoder import DocumentEncoder
from statex.data.tokens import (
    TextOrder,
    TokenFolder,
    are_prepared,
    check_text,
    prepare_tokens,
    tokens_key,
    whole_windows,
)
from statex.errors import UserError
from statex.settings import TextSource


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Several files and windows of a text of 5,000 tokens."""
    monkeypatch.setattr(tokens, "TOKENS_PER_FILE", 700)
    monkeypatch.setattr(tokens, "WINDOW", 2048)


@pytest.fixture
def prepared(data, tokenizer, tmp_path):
    return prepare_tokens(data, tokenizer, tmp_path, 10**9)


def all_ids(data, tokenizer):
    documents = open_documents(data.text, shuffle_seed=data.seed, shuffle_buffer=data.shuffle_buffer)
    return list(DocumentEncoder(tokenizer)(documents))


def test_the_whole_text_lies_there_document_by_document(data, tokenizer, prepared):
    documents = all_ids(data, tokenizer)
    wanted = np.concatenate(documents)
    assert prepared.is_whole
    assert (prepared.num_tokens, prepared.num_documents) == (len(wanted), len(documents))
    assert len(prepared.files) > 3
    numbers = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    for start, length in ((0, 10), (690, 40), (0, len(wanted)), (len(wanted) - 5, 5), (1399, 1500)):
        ids, seq_idx = prepared.read(start, length)
        assert (ids == wanted[start : start + length]).all()
        assert (seq_idx == numbers[start : start + length] - numbers[start]).all()
        assert (ids.dtype, seq_idx.dtype) == (np.int64, np.int32)


def test_an_epoch_reads_each_sequence_once_in_an_order_of_its_own(data, tokenizer, prepared):
    order = TextOrder(prepared, 64, seed=5)
    count = prepared.num_tokens // 64
    epochs = [[order.read(epoch * count + i)[0].tobytes() for i in range(count)] for epoch in range(2)]
    wanted = [prepared.read(64 * i, 64)[0].tobytes() for i in range(count)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(wanted)
    assert len({tuple(epochs[0]), tuple(epochs[1]), tuple(wanted)}) == 3
    other = [TextOrder(prepared, 64, seed=6).read(i)[0].tobytes() for i in range(count)]
    assert other != epochs[0]
    within = 2048 // 64  # sequences of a window stay in it
    assert sorted(epochs[0][:within]) == sorted(wanted[:within])


def test_the_order_is_the_same_however_much_is_prepared(data, tokenizer, tmp_path, prepared):
    some = prepare_tokens(data, tokenizer, tmp_path / "some", whole_windows(1500, 100))
    assert not some.is_whole
    assert 2000 <= some.num_tokens < prepared.num_tokens
    few, all_of_it = TextOrder(some, 100, seed=5), TextOrder(prepared, 100, seed=5)
    assert all((few.read(i)[0] == all_of_it.read(i)[0]).all() for i in range(15))


@pytest.mark.parametrize("length", [1, 64, 100, 300, 700, 1500, 3000])
def test_what_is_prepared_is_enough_for_what_is_read(data, tokenizer, tmp_path, prepared, length):
    """Whatever part of a window the sequences leave over; and no window more than is read."""
    for count in (1, 20, 21, 3000 // length):
        read = count * length
        needed = whole_windows(read, length)
        assert read <= needed < read + max(2048, length)
        if needed <= prepared.num_tokens:
            some = prepare_tokens(data, tokenizer, tmp_path / str(needed), needed)
            assert len(TextOrder(some, length, seed=0).read(count - 1)[0]) == length
    assert whole_windows(0, length) == 0


def test_what_is_there_is_used_and_what_is_missing_added(data, tokenizer, tmp_path, prepared, monkeypatch):
    parent = tmp_path / "some"
    some = prepare_tokens(data, tokenizer, parent, 1500)
    assert 1500 <= some.num_tokens < 2500
    written = {path.name: path.stat().st_mtime_ns for path in some.folder.glob("0*")}
    assert are_prepared(data, tokenizer, parent, 1500)
    assert not are_prepared(data, tokenizer, parent, 2500)
    more = prepare_tokens(data, tokenizer, parent, 10**9)
    assert all((more.folder / name).stat().st_mtime_ns == changed for name, changed in written.items())
    assert (more.read(0, more.num_tokens)[0] == prepared.read(0, prepared.num_tokens)[0]).all()
    monkeypatch.setattr(tokens, "_prepare", None)  # nothing is tokenised again
    assert prepare_tokens(data, tokenizer, parent, 10**9).num_tokens == prepared.num_tokens


def prepare_killed(data, tokenizer, parent, number):
    """Prepare tokens, killed when file `number` has been written."""
    write = tokens._write_file

    def killed(folder, file, documents):
        found = write(folder, file, documents)
        if file == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    tokens.TOKENS_PER_FILE, tokens.WINDOW, tokens._write_file = 700, 2048, killed
    prepare_tokens(data, tokenizer, parent, 10**9)


@pytest.mark.parametrize("number", [0, 2])
def test_a_preparation_that_was_killed_resumes(data, tokenizer, tmp_path, prepared, number):
    """Killed when a file is written of which the index does not know yet."""
    parent = tmp_path / "killed"
    assert run(prepare_killed, data, tokenizer, parent, number).returncode == -9
    again = prepare_tokens(data, tokenizer, parent, 10**9)
    assert (again.read(0, again.num_tokens)[0] == prepared.read(0, prepared.num_tokens)[0]).all()
    assert again.files == prepared.files


FAULTS = {
    "gone": ConnectionError("Server Disconnected"),
    "a stall": TimeoutError("The read operation timed out"),
    "a stall, of the hub's client": HTTPError("timed out"),
    "refused by the hub": HfHubHTTPError("503 Server Error:\nunavailable", response=mock.Mock(headers={})),
    "a stall, of requests": requests.exceptions.ReadTimeout("Read timed out. (read timeout=10)"),
    "broken off, of aiohttp": aiohttp.ServerDisconnectedError(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_vanishes_midway(data, tokenizer, tmp_path, monkeypatch, fault):
    """All that came before it stays, and the same call resumes."""
    last = [400]

    def rows():
        for number in range(last[0]):
            yield {"text": f"document {number} " * 5}
        if last[0] < 400:
            raise FAULTS[fault]

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    of_hub = data.model_copy(update={"text": TextSource(hub="someone/text"), "shuffle_buffer": 10})
    whole = prepare_tokens(of_hub, tokenizer, tmp_path / "whole", 10**9)
    prepared = [0]
    for last[0] in (150, 350):
        with pytest.raises(UserError) as caught:
            prepare_tokens(of_hub, tokenizer, tmp_path / "faulty", 10**9)
        message = str(caught.value)
        assert message.startswith("data.text.hub = 'someone/text': can no longer be read from the hub (")
        assert message.endswith("check the network; the same command resumes and keeps the tokens that are prepared.")
        assert "\n" not in message
        (folder,) = (path for path in (tmp_path / "faulty").iterdir() if path.is_dir())
        prepared.append(TokenFolder(folder, verify=True).num_tokens)
    assert 0 < prepared[1] < prepared[2] < whole.num_tokens
    last[0] = 400
    again = prepare_tokens(of_hub, tokenizer, tmp_path / "faulty", 10**9)
    assert again.is_whole
    assert again.num_documents == whole.num_documents
    for mine, theirs in zip(again.read(0, again.num_tokens), whole.read(0, whole.num_tokens), strict=True):
        assert (mine == theirs).all()


def flip(path):
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("00001.tokens", flip, "its content is not what was written"),
        ("00000.ends", flip, "its content is not what was written"),
        ("00001.tokens", lambda path: path.write_bytes(path.read_bytes()[:-2]), "it should have"),
        ("00000.ends", Path.unlink, "it should have"),
        ("index.json", lambda path: path.write_text("{"), "missing or damaged"),
        ("index.json", lambda path: path.write_text("[]"), "missing or damaged"),
    ],
)
def test_damage_is_named(data, tokenizer, tmp_path, prepared, name, damage, problem):
    damage(prepared.folder / name)
    with pytest.raises(UserError, match=problem) as caught:
        prepare_tokens(data, tokenizer, tmp_path, 10**9)
    assert caught.value.value == str(prepared.folder / name)
    assert caught.value.remedy == f"remove {prepared.folder}; its tokens will be prepared again"


def test_tokens_of_another_text_or_tokenizer_are_others(data, tokenizer, foreign_tokenizer, tmp_path):
    other_text = tmp_path / "other.jsonl"
    other_text.write_text(json.dumps({"text": "another text"}))
    changes = [
        {"text": TextSource(files=[str(other_text)])}, {"seed": 8}, {"shuffle_buffer": 5},
        {"text": data.text.model_copy(update={"held_out": 0.2})},
        {"text": data.text.model_copy(update={"bad_records": "skip"})},
        *({"text": TextSource(hub="someone/text", hub_revision=revision)} for revision in (None, "v1", "v2")),
    ]  # fmt: skip
    keys = [tokens_key(data, tokenizer), tokens_key(data, foreign_tokenizer)]
    keys += [tokens_key(data.model_copy(update=change), tokenizer) for change in changes]
    assert len(set(keys)) == len(keys)
    key = tokens_key(data.model_copy(update=changes[0]), tokenizer)
    other_text.write_text(json.dumps({"text": "another Text"}))
    assert tokens_key(data.model_copy(update=changes[0]), tokenizer) != key


def test_a_bad_record_late_in_the_text_is_named_or_skipped(data, tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    good = [json.dumps({"text": f"document {i} " * 20}) + "\n" for i in range(100)]
    path.write_text("".join(good) + "{]\n" + good[0])
    late = data.model_copy(update={"text": TextSource(files=[str(path)]), "shuffle_buffer": 1})
    with pytest.raises(UserError, match=r"line 101 .*bad_records"):
        prepare_tokens(late, tokenizer, tmp_path, 10**9)
    skipping = late.model_copy(update={"text": TextSource(files=[str(path)], bad_records="skip")})
    assert prepare_tokens(skipping, tokenizer, tmp_path, 10**9).is_whole
    with pytest.raises(UserError, match="line 101"):  # what was skipped for another recipe is not skipped for this one
        prepare_tokens(late, tokenizer, tmp_path, 10**9)


def test_ids_beyond_16_bits_in_a_vocabulary_with_gaps(data, tmp_path):
    backend = Tokenizer(models.WordLevel({"[end]": 0, "Document": 70_000, "[other]": 70_001}, unk_token="[other]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[end]")
    found = prepare_tokens(data, tokenizer, tmp_path, 10**9)
    assert set(found.read(0, found.num_tokens)[0]) == {0, 70_000, 70_001}


def test_progress_ends_at_what_is_needed(data, tokenizer, tmp_path):
    seen = []
    prepare_tokens(data, tokenizer, tmp_path, 1500, progress=lambda *event: seen.append(event))
    assert seen[-1] == (1500, 1500)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


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


def test_text_shorter_than_a_sequence(data, tokenizer, prepared):
    with pytest.raises(UserError, match=r"training\.sequence_length = 1000000: .* shorten it or give more text"):
        check_text(data, tokenizer, 1_000_000)
    with pytest.raises(UserError, match="is longer than the whole training text"):
        TextOrder(prepared, 1_000_000, seed=0)


def test_tokenizers_that_cannot_pack(tokenizer):
    class Slow:
        eos_token_id, name_or_path = 0, "slow"

    with pytest.raises(UserError, match="is not a fast tokenizer"):
        DocumentEncoder(Slow())
    without_end = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="has no eos_token"):
        DocumentEncoder(without_end)
