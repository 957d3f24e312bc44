"""A small tokenizer and a little text for tiny models."""

import random
from importlib.util import find_spec

import pytest
from tiny_models import MODELS, VOCABULARY

from statex.data.tokenizer import train_tokenizer
from statex.recipe import Evaluation
from statex.settings import Recall, TextSource, Tokenizer

RECALL = Recall(num_keys=16, num_values=16, shapes=[(16, 4)])


@pytest.fixture(scope="session", autouse=True)
def few_adjectives():
    """RULER's module sorts all pairs of an adjective and a noun as it is imported: six million take 10 s."""
    with pytest.MonkeyPatch.context() as patched:
        if find_spec("wonderwords"):
            import wonderwords

            words = wonderwords.RandomWord()
            words._categories = words._categories | {"adjectives": words._categories["adjectives"][:20]}
            patched.setattr(wonderwords, "RandomWord", lambda: words)
        yield


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Twelve documents of a few hundred words each, drawn from a small vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(200)]
    for number in range(12):
        text = " ".join(generator.choice(words) for _ in range(400))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return TextSource(files=[str(folder / "*.txt")], held_out=0.5)


@pytest.fixture(scope="session")
def tokenizer(source):
    return train_tokenizer(source, Tokenizer.model_construct(vocab_size=VOCABULARY, training_bytes=100_000), RECALL)


@pytest.fixture(scope="session")
def saved_tokenizer(tokenizer, tmp_path_factory):
    """The tokenizer as lm-eval's tasks need it: with a path."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text(source):
    """The text of lm-eval's `metadata`."""
    return {"text": source.model_dump()}


@pytest.fixture(scope="session")
def evaluation():
    """All four suites in a second."""
    return Evaluation.model_validate(
        {
            "batch_size": 3,
            "mqar": {"num_pairs": [2, 4], "num_keys": 16, "num_values": 16, "num_items": 5},
            "passkey": {"lengths": [140, 150], "num_depths": 2, "num_items": 4},
            "ar_hits": {"length": 64, "num_windows": 8, "theta": 1, "count_tokens": 3000},
            "nll_by_position": {"length": 128, "num_windows": 4},
        }
    )
