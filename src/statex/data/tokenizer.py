"""The tokenizer of a model made from scratch, how prompts become tokens, and the ids that recall data is made of."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from statex.data.documents import open_documents
from statex.errors import UserError
from statex.settings import Recall, TextSource, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256


def train_tokenizer(source: TextSource, section: Tokenizer, recall: Recall) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer on the training part of the text; the same text gives the same tokenizer.

    The ids: 0 is `<|endoftext|>` (beginning, end and padding; it follows each document), then the bytes and the
    merges, and last the reserved `<|key_i|>` and `<|value_i|>` of recall data, `section.vocab_size` in all. Encoding
    adds no special token.

    Raises:
        UserError: the vocabulary is too small for the reserved tokens or too large for the text.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    num_reserved = recall.num_keys + recall.num_values
    num_learnt = section.vocab_size - num_reserved
    if num_learnt < NUM_BYTES + 1:
        needed = NUM_BYTES + 1 + num_reserved
        problem = f"{NUM_BYTES} bytes, {END_OF_TEXT} and {num_reserved} recall tokens need {needed}"
        remedy = f"give at least {needed} or lower data.recall.num_keys and num_values"
        raise UserError("data.tokenizer.vocab_size", section.vocab_size, problem, remedy)

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_learnt,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_training_text(source, section.training_bytes), trainer)
    if backend.get_vocab_size() < num_learnt:
        most = backend.get_vocab_size() + num_reserved
        problem = f"the text gives a vocabulary of {most} only"
        raise UserError("data.tokenizer.vocab_size", section.vocab_size, problem, "lower it or give more text")
    reserved = [key_token(i) for i in range(recall.num_keys)] + [value_token(i) for i in range(recall.num_values)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in reserved])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _training_text(source: TextSource, num_bytes: int) -> Iterator[str]:
    """Documents in a fixed shuffled order, up to `num_bytes`: the first ones alone would cover one corner of it."""
    for document in open_documents(source, part="training", shuffle_seed=0):
        yield document["text"]
        num_bytes -= len(document["text"].encode("utf-8"))
        if num_bytes <= 0:
            return


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt, with the tokenizer's beginning of a text but not its end."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def encode_continuation(tokenizer: Any, before: str, text: str) -> list[int]:
    """The tokens of a text that continues another: both tokenised together, less the tokens of the first alone.

    lm-eval splits them the same way (`_encode_pair`). Tokenised by itself, the text would differ with a tokenizer that
    puts a space before each text, as Llama 2's does.

    Raises:
        UserError: this tokenizer gives `text` no token of its own.
    """
    ids = encode_prompt(tokenizer, before + text)[len(encode_prompt(tokenizer, before)) :]
    if not ids:
        problem = f"makes one token of {text!r} and of what stands before it"
        raise UserError("tokenizer", tokenizer.name_or_path, problem, "use a tokenizer that splits text at spaces")
    return ids


def prefix_token(tokenizer: Any) -> int:
    """The token that begins a text with nothing before it: beginning of text, else end of text.

    Raises:
        UserError: the tokenizer has neither.
    """
    known = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if known is None:
        problem = "has neither bos_token nor eos_token, one of which lm-eval's requests begin with"
        raise UserError("tokenizer", tokenizer.name_or_path, problem, "set one of them in tokenizer_config.json")
    return known


def key_token(i: int) -> str:
    return f"<|key_{i}|>"


def value_token(i: int) -> str:
    return f"<|value_{i}|>"


def recall_vocabulary(
    tokenizer: "PreTrainedTokenizerBase", num_keys: int, num_values: int
) -> tuple[np.ndarray, np.ndarray]:
    """The token ids used as keys and values in recall data: two disjoint int64 arrays, (num_keys,) and (num_values,).

    They are the reserved tokens where the tokenizer has them. Else they are ordinary tokens, evenly spaced over the
    vocabulary, keys among values; these depend on both counts, so training and evaluation must ask for the same.

    Raises:
        UserError: there are fewer reserved, or fewer ordinary, tokens than asked for.
    """
    vocabulary = tokenizer.get_vocab()
    if key_token(0) in vocabulary and value_token(0) in vocabulary:
        keys = _reserved_ids(vocabulary, key_token, num_keys, "num_keys")
        return keys, _reserved_ids(vocabulary, value_token, num_values, "num_values")

    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ordinary = np.array(sorted(set(vocabulary.values()) - special), dtype=np.int64)
    count = num_keys + num_values
    if count > len(ordinary):
        problem = (
            f"together with num_values = {num_values} is more than the {len(ordinary)} ordinary tokens of the tokenizer"
        )
        raise UserError("num_keys", num_keys, problem, "lower num_keys or num_values")
    chosen = ordinary[np.arange(count) * len(ordinary) // count]
    is_key = np.zeros(count, dtype=bool)
    is_key[np.arange(num_keys) * count // num_keys] = True
    return chosen[is_key], chosen[~is_key]


def _reserved_ids(vocabulary: dict[str, int], token, count: int, field: str) -> np.ndarray:
    if token(count - 1) not in vocabulary:
        known = next(i for i in range(count) if token(i) not in vocabulary)
        problem = f"the tokenizer has only {known} reserved tokens for it"
        raise UserError(field, count, problem, f"give at most {known}")
    return np.array([vocabulary[token(i)] for i in range(count)], dtype=np.int64)
