"""The tokenizer of an expanded folder is made by the class that transformers chooses for its source."""

import pytest
from transformers import AutoTokenizer

import statex
from common import make_hybrid, make_mamba2
from statex.checkpoint import load_tokenizer, save_with_companions
from tokenizer_folders import TEXT, VOCABULARY, write_qwen3_5, write_tokenizer


def write_mamba2(folder):
    make_mamba2(vocab_size=VOCABULARY).save_pretrained(folder)
    write_tokenizer(folder)


def write_jamba(folder):
    make_hybrid("jamba", vocab_size=VOCABULARY).save_pretrained(folder)
    write_tokenizer(folder, "GPT2Tokenizer")


@pytest.mark.parametrize("write", [write_qwen3_5, write_mamba2, write_jamba])
def test_an_expanded_folder_s_tokenizer_is_its_source_s(write, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write(source)
    model = statex.load(source)
    statex.expand(model, every=1, factor=2)
    save_with_companions(model, source, out)
    theirs, ours = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out)
    assert type(ours) is type(theirs)
    assert ours(TEXT).input_ids == theirs(TEXT).input_ids == load_tokenizer(out)(TEXT).input_ids
