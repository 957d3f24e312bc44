"""Tokenizers of the Llama-2 kind, as SentencePiece makes them: a space is put before each text."""

import json
import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("always", "first", "normalizer")
"""How the space comes there: by Metaspace's two schemes, or by a normalizer, as in Llama 2's own tokenizer.json."""
WORDS = """
The passkey is. Remember it. What is the pass key? The grass is green. The sky is blue. The sun is yellow. Here we go.
There and back again. One of the special magic numbers for is: mentioned in the provided text? VAR = are assigned
"""
VOCAB_SIZE = 240


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of printable ASCII that begins each text with <s>."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if kind == "normalizer" else kind)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=["▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation],
    )  # fmt: skip
    backend.train_from_iterator([WORDS], trainer)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    if kind == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend = Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | {"pre_tokenizer": None}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
