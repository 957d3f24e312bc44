"""Questions about needles in a context: asking them, sharing the context's state, and scoring the answers.

Several questions about one context share its prefill: it is read once, and its state is copied for each question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from statex.data.tokenizer import encode_continuation, encode_prompt
from statex.evaluation.context import Context
from statex.evaluation.records import Score, digest
from statex.evaluation.suite import Cell

if TYPE_CHECKING:
    import torch

    from statex.evaluation.reader import State


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Args:
        text: the text after the context, up to the answer.
        answers: strings that must occur in the model's continuation.
        slice: the cell of the question.
        measured: facts about the question itself.
    """

    text: str
    answers: tuple[str, ...]
    slice: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A context and the questions about it."""

    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _TokenizedQuestion:
    """A question in tokens: its answers as text, the row of the batch that holds its context, and its score to be
    filled in."""

    answers: tuple[str, ...]
    row: int
    ids: list[int]
    answer: list[int]
    score: Score


def tokenize_prompt(tokenizer: Any, prompt: Prompt) -> tuple[list[int], list[list[int]]]:
    """The tokens of the context, and of each question.

    Each question is tokenised together with its context, as a user would ask it. The common beginning of all is the
    context; for a single question that is all but its last token.
    """
    asked = [encode_prompt(tokenizer, prompt.context + question.text) for question in prompt.questions]
    shared = asked[0] if len(asked) == 1 else encode_prompt(tokenizer, prompt.context)
    length = min(common_length([shared, *asked]), min(map(len, asked)) - 1)
    return asked[0][:length], [ids[length:] for ids in asked]


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all sequences have in common at the beginning."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    different = (i for i in range(shortest) if any(ids[i] != first[i] for ids in sequences))
    return next(different, shortest)


def num_tokens(tokenizer: Any, prompt: Prompt) -> int:
    """Tokens of the longest of a prompt's questions with its context and answer."""
    texts = [prompt.context + question.text + answer_text(question) for question in prompt.questions]
    return max(len(encode_prompt(tokenizer, text)) for text in texts)


def answer_text(question: Question) -> str:
    """The continuation by a model that knows the answer."""
    return " " + " ".join(question.answers)


def score_prompts(context: Context, cell: Cell, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Score]:
    """Ask every question and score it: `accuracy`, the share of its answers found, and `answer_nll`, per token.

    An answer is found if it is a substring, ignoring case, of what the model generates greedily, as RULER counts, in
    `max_new_tokens` tokens. They are fewer where the model's attention ends before, as the length of a prompt counts
    its answer, and not what else the model may say; and never fewer than the longest answer has with this tokenizer.
    A context is read once for all its questions.
    """
    size, scores = context.evaluation.batch_size, []
    batches = [_tokenize_batch(context, cell, prompts[i : i + size], i) for i in range(0, len(prompts), size)]
    answers = [(one.score.measured["tokens"], len(one.answer)) for _, asked in batches for one in asked]
    if context.limit is not None:
        max_new_tokens = min(max_new_tokens, context.limit - max(whole - answer for whole, answer in answers))
    max_new_tokens = max(max_new_tokens, *(answer for _, answer in answers))
    for contexts, asked in batches:
        scores += _ask(context, contexts, asked, max_new_tokens)
    return scores


def _tokenize_batch(
    context: Context, cell: Cell, prompts: Sequence[Prompt], first: int
) -> tuple[list[list[int]], list[_TokenizedQuestion]]:
    """The contexts of some prompts, the first of which is number `first` of its cell, and all their questions."""
    tokenizer = context.tokenizer
    contexts, asked = [], []
    for row, prompt in enumerate(prompts):
        ids, questions = tokenize_prompt(tokenizer, prompt)
        contexts.append(ids)
        cluster = f"{cell.name}/{first + row}"
        for number, (question, question_ids) in enumerate(zip(prompt.questions, questions, strict=True)):
            answer = encode_continuation(tokenizer, prompt.context + question.text, answer_text(question))
            score = Score(
                item=cluster if len(questions) == 1 else f"{cluster}-{number}",
                cluster=cluster,
                slice=cell.slice | question.slice,
                scores={},
                digest=digest(ids, question_ids, *question.answers),
                measured={"tokens": len(ids) + len(question_ids) + len(answer)} | question.measured,
            )
            asked.append(_TokenizedQuestion(question.answers, row, question_ids, answer, score))
    return contexts, asked


def _ask(
    context: Context, contexts: list[list[int]], asked: list[_TokenizedQuestion], max_new_tokens: int
) -> list[Score]:
    """Read the contexts, then ask all questions from copies of their states."""
    reader = context.reader
    _, state = reader.read(contexts)
    scores: dict[str, Score] = {}
    for part, logits, after in _read_questions(context, state, asked):
        nll, _ = reader.score_continuations(logits, after, [one.answer for one in part])
        said = continuations(context, logits, after, [one.answers for one in part], max_new_tokens)
        for one, value, text in zip(part, nll, said, strict=True):
            found = sum(answer.lower() in text.lower() for answer in one.answers) / len(one.answers)
            values = {"accuracy": found, "answer_nll": float(value) / len(one.answer)}
            scores[one.score.item] = replace(one.score, scores=values)
    return [scores[one.score.item] for one in asked]


def _read_questions(
    context: Context, state: State, asked: list[_TokenizedQuestion]
) -> Iterator[tuple[list[_TokenizedQuestion], torch.Tensor, State]]:
    """Batches of questions with the logits (B, V) and the state after them; `state` is that of the contexts.

    Padding after a state is not possible, so questions of one length are read together. Where states can be joined,
    questions of all lengths continue as one batch: answers take far more steps than questions.
    """
    import torch

    reader, size = context.reader, context.evaluation.batch_size
    asked = sorted(asked, key=lambda one: len(one.ids))
    for start in range(0, len(asked), size):
        read = []
        for _, group in itertools.groupby(asked[start : start + size], key=lambda one: len(one.ids)):
            part = list(group)
            copied = reader.copy_state(state, [one.row for one in part])
            read.append((part, *reader.read([one.ids for one in part], copied)))
        if len(read) > 1 and reader.can_batch_states:
            parts, logits, states = zip(*read, strict=True)
            yield [one for part in parts for one in part], torch.cat(logits), reader.join_states(states)
        else:
            yield from read


def continuations(
    context: Context, logits: torch.Tensor, state: State, answers: Sequence[Sequence[str]], max_new_tokens: int
) -> list[str]:
    """The model's continuation of each row, until it ends its text, has given all answers, or `max_new_tokens`."""
    tokenizer, ends = context.tokenizer, context.reader.end_tokens(context.tokenizer)

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def finished(row: int, tokens: list[int]) -> bool:
        text = decode(tokens).lower()
        return tokens[-1] in ends or all(answer.lower() in text for answer in answers[row])

    return [decode(tokens) for tokens in context.reader.generate(logits, state, max_new_tokens, finished)]
