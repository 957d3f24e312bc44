"""Synthetic recall data: MQAR of token ids, and a passkey hidden in filler text.

N: sequences. T: tokens of a sequence. D: pairs of a sequence. S: slots for queries, (T - 2 D) // 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from statex.data.tokenizer import encode_continuation
from statex.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a position that is not scored, as in transformers
POWER = 0.01  # Zoology's power_a: a gap of g slots has weight POWER * g ** (POWER - 1)

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = " The passkey is {passkey}. Remember it. {passkey} is the passkey."
QUESTION = " What is the pass key? The passkey is"
NUM_DIGITS = 5


def mqar_batch(
    seed: int | Sequence[int] | np.random.Generator,
    num_sequences: int,
    length: int,
    num_pairs: int,
    key_ids: np.ndarray,
    value_ids: np.ndarray,
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): `k1 v1 k2 v2 ... kD vD`, then queries `ki vi`.

    The keys of a sequence are distinct, and so are its values. Each pair is asked for once; behind the pairs there are
    S slots of two tokens, and the slots that are asked in are drawn without replacement with power-law weights, near
    ones first. With T = 4 D the D queries fill all slots (the dense form). Tokens that are neither pair nor query are
    random values, never keys: a key with another value behind it would define the key again.

    Args:
        seed: what all draws derive from: a generator, or the seed of a new one.
        num_sequences, length, num_pairs: N, T and D, with 4 D <= T.
        key_ids, value_ids: (num_keys,) and (num_values,), disjoint, from `recall_vocabulary`.

    Returns:
        input_ids and labels, (N, T) int64. `labels[n, t] == input_ids[n, t]` where t holds the answer of a query, -100
        elsewhere: labels are not shifted, the model shifts them (transformers' convention).

    Raises:
        UserError: the pairs do not fit the length, the keys or the values.
    """
    N, T, D = num_sequences, length, num_pairs
    most = min(T // 4, len(key_ids), len(value_ids))
    if not 1 <= D <= most:
        problem = f"does not fit length = {T}, {len(key_ids)} keys and {len(value_ids)} values"
        raise UserError("num_pairs", D, problem, f"give 1 to {most} pairs, or a longer length")
    generator = np.random.default_rng(seed)
    keys = key_ids[_distinct(generator, N, len(key_ids), D)]  # (N, D)
    values = value_ids[_distinct(generator, N, len(value_ids), D)]  # (N, D)

    ids = value_ids[generator.integers(len(value_ids), size=(N, T))]
    ids[:, 0 : 2 * D : 2] = keys
    ids[:, 1 : 2 * D : 2] = values
    queries = 2 * D + 2 * _query_slots(generator, N, (T - 2 * D) // 2, D)  # (N, D): position of each pair's query
    np.put_along_axis(ids, queries, keys, axis=1)
    np.put_along_axis(ids, queries + 1, values, axis=1)
    labels = np.full((N, T), IGNORED)
    np.put_along_axis(labels, queries + 1, values, axis=1)
    return torch.from_numpy(ids), torch.from_numpy(labels)


def _distinct(generator: np.random.Generator, N: int, size: int, count: int) -> np.ndarray:
    """`count` different indices below `size` in each of N rows, in random order, (N, count)."""
    return _smallest(generator.random((N, size), dtype=np.float32), count)


def _smallest(noise: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` smallest of each row, smallest first: argsort of all would take most of the time."""
    chosen = np.argpartition(noise, count - 1, axis=1)[:, :count]
    order = np.take_along_axis(noise, chosen, axis=1).argsort(axis=1)
    return np.take_along_axis(chosen, order, axis=1)


def _query_slots(generator: np.random.Generator, N: int, S: int, D: int) -> np.ndarray:
    """The slot of each pair's query, (N, D), all different in a row.

    Adding Gumbel noise to log weights and taking the D largest is drawing without replacement by those weights.
    """
    log_weights = (POWER - 1) * np.log(np.arange(1, S + 1))
    return _smallest(-log_weights - generator.gumbel(size=(N, S)), D)


@dataclass(frozen=True)
class PasskeyItem:
    """One question: `prompt_ids`, then a model should continue with `answer_ids`.

    `num_tokens` is the length of both together, `depth` the share of the filler that stands before the needle.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    passkey: str
    depth: float
    num_tokens: int


class PasskeyBuilder:
    """Builds passkey questions of an exact number of tokens (filler, needle, filler, question), for training too.

    Sentences of the filler, the needle, the question and the answer are tokenised behind the text that they follow, and
    joined as ids, so that a length is met exactly. A tokenizer that begins each text with a token does so here.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        begin = [token for token in tokenizer("a")["input_ids"][:1] if token == tokenizer.bos_token_id]
        self.prefix = np.array(begin, dtype=np.int64)
        sentences = [self._encode(FILLER[i - 1], f" {sentence}") for i, sentence in enumerate(FILLER)]
        self.cycle = np.concatenate(sentences)  # one round of the filler
        # Distances of the ends of sentences from the end of the filler, within the last round
        self.borders = np.cumsum([0] + [len(sentence) for sentence in sentences[:0:-1]])
        self.question = self._encode(FILLER[-1], QUESTION)

    def build(self, length: int, depth: float, passkey: str) -> PasskeyItem:
        """The question whose prompt and answer have `length` tokens together.

        Args:
            length: tokens of prompt and answer.
            depth: where the needle stands, 0 (beginning) to 1 (end); it is moved to the nearest end of a sentence.
            passkey: the digits to be found.

        Raises:
            UserError: the length has no room for needle, question and answer, or the depth is outside 0 to 1.
        """
        if not 0 <= depth <= 1:
            raise UserError("depth", depth, "is outside 0 to 1", "give a share of the context")
        needle, answer = self._needle_and_answer(passkey)
        num_filler = length - sum(map(len, [self.prefix, needle, self.question, answer]))
        if num_filler < 0:
            problem = "is too short for the needle, the question and the answer"
            raise UserError("length", length, problem, f"give at least {length - num_filler} tokens")
        filler = np.resize(self.cycle[::-1], num_filler)[::-1]  # cut at its beginning, whole at its end
        position = self._nearest_border(num_filler, depth)
        pieces = [self.prefix, filler[:position], needle, filler[position:], self.question]
        prompt_ids = np.concatenate(pieces).tolist()
        measured = position / num_filler if num_filler else 0.0
        return PasskeyItem(prompt_ids, answer.tolist(), passkey, measured, len(prompt_ids) + len(answer))

    @property
    def min_length(self) -> int:
        """A length that has room for any passkey of five digits, each digit and the space a token of its own."""
        needle, answer = self._needle_and_answer("1" * NUM_DIGITS)
        num_fixed = len(self.prefix) + len(needle) - 2 * len(answer) + len(self.question)
        return num_fixed + 3 * (NUM_DIGITS + 1)  # twice in the needle, once behind the question

    def _nearest_border(self, num_filler: int, depth: float) -> int:
        rounds = np.arange(num_filler // len(self.cycle) + 1)[:, None] * len(self.cycle)
        positions = num_filler - (rounds + self.borders).ravel()
        positions = np.append(positions[positions >= 0], 0)
        return int(positions[np.abs(positions - depth * num_filler).argmin()])

    def _needle_and_answer(self, passkey: str) -> tuple[np.ndarray, np.ndarray]:
        needle = self._encode(FILLER[-1], NEEDLE.format(passkey=passkey))
        return needle, self._encode(FILLER[-1] + QUESTION, f" {passkey}")

    def _encode(self, before: str, text: str) -> np.ndarray:
        return np.array(encode_continuation(self.tokenizer, before, text), dtype=np.int64)


def random_passkey(generator: np.random.Generator) -> str:
    """Five digits, the first of them not 0."""
    return str(generator.integers(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS))


def passkey_batch(
    seed: int | Sequence[int] | np.random.Generator, num_sequences: int, length: int, builder: PasskeyBuilder
) -> tuple[Tensor, Tensor]:
    """Passkey questions with their answers, for training, at random depths.

    Only the answer has labels. The rest is filler that a model knows by heart after a few steps, and the first mention
    of the passkey, which nothing can predict: in the mean loss they would drown the few tokens that need recall.

    Returns:
        input_ids and labels, (num_sequences, length) int64, labels -100 outside the answers and not shifted.

    Raises:
        UserError: the length has no room for needle, question and answer.
    """
    generator = np.random.default_rng(seed)
    input_ids = np.empty((num_sequences, length), dtype=np.int64)
    labels = np.full((num_sequences, length), IGNORED)
    for n in range(num_sequences):
        item = builder.build(length, float(generator.random()), random_passkey(generator))
        input_ids[n] = item.prompt_ids + item.answer_ids
        labels[n, len(item.prompt_ids) :] = item.answer_ids
    return torch.from_numpy(input_ids), torch.from_numpy(labels)
