import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from statex.data.tokenizer import END_OF_TEXT, train_tokenizer
from statex.settings import Data, Recall, TextSource, Tokenizer

NUM_DOCUMENTS = 120


def document_text(i: int) -> str:
    return f"Document {i} tells of {i * i} things, and of {i % 7} more. " * (1 + i % 5)


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": document_text(i)}) + "\n" for i in range(NUM_DOCUMENTS)))
    return path


@pytest.fixture(scope="session")
def data(jsonl) -> Data:
    recall = Recall(num_keys=16, num_values=16, shapes=[(16, 4), (32, 8)])
    return Data(text=TextSource(files=[str(jsonl)]), recall=recall, tokenizer=Tokenizer(vocab_size=320), seed=7)


@pytest.fixture(scope="session")
def tokenizer(data):
    return train_tokenizer(data.text, data.tokenizer, data.recall)


@pytest.fixture
def foreign_tokenizer():
    """A tokenizer of 150 words that has no reserved recall tokens."""
    backend = Backend(models.WordLevel({END_OF_TEXT: 0} | {f"w{i}": i + 1 for i in range(150)}, unk_token=END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
