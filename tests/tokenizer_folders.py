"""Folders whose tokenizer transformers makes by another class than their tokenizer_config.json names."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from delta_models import make_delta

VOCABULARY = 264
TEXT = "a1 12 e\u0301"
"""Taken apart in one way by the tokenizer as it is stored, and in another by each class that splits text itself."""


def write_tokenizer(folder, named=None):
    """A tokenizer of bytes and a few pairs, and a tokenizer_config.json that names this class."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "a1", "eĠ"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2"), ("a", "1"), ("e", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    if named is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": named}))


def write_qwen3_5(folder):
    """As on the hub: a model of text and images, and the generic class of tokenizers."""
    sizes = {"layer_types": ["linear_attention"], "num_hidden_layers": 1, "vocab_size": VOCABULARY}
    make_delta("qwen3_5_text", **sizes).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_5", "text_config": json.loads(path.read_text())}))
    write_tokenizer(folder, "TokenizersBackend")
