"""Open-book question answering as in Based (arXiv 2402.18668) and JRT (arXiv 2407.05483), for lm-eval.

The passage is cut to a number of tokens around the answer, then the question follows as the beginning of a sentence,
and the answer counts if it occurs in the model's output (`contains`). lm-eval's own triviaqa, nq_open and drop are
closed-book, or give the whole passage. The length, in `max_seq_lengths`, names the metric, as in lm-eval's RULER tasks.

The data sets and the prompt are those of JRT's tasks (github.com/HazyResearch/prefix-linear-attention,
lm-eval-harness/lm_eval/tasks/based_{triviaqa,nq,drop}/task.py): parquet, one split "validation", columns `context`,
`question` and `answers`. Passages of NQ come cut to 512, 1024 or 2048 tokens of another tokenizer; the longest are cut
further here. JRT keeps the beginning of TriviaQA's and DROP's, and leaves 50 tokens of every length for the answer.
"""

import re
from collections.abc import Iterator
from typing import Any

DEFAULT_LENGTHS = (512, 1024, 2048)
ROOM = 50
"""Tokens of a length that are left for the answer."""


class OpenBookData:
    """A data set on the hub with `context`, `question` and `answers`, which lm-eval calls for its documents."""

    def __init__(self, path: str):
        self.DATASET_PATH = path  # as lm-eval calls it

    def __call__(self, **metadata: Any) -> dict:
        """{"test": documents}, each question at each length."""
        import datasets

        from statex.checkpoint import read_tokenizer

        tokenizer = read_tokenizer(metadata.get("tokenizer") or metadata["pretrained"])
        rows = datasets.load_dataset(metadata.get("data") or self.DATASET_PATH, split="validation")
        lengths = metadata.get("max_seq_lengths") or DEFAULT_LENGTHS
        documents = [one for row in rows for one in documents_of(row, tokenizer, lengths)]
        return {"test": datasets.Dataset.from_list(documents)}


triviaqa = OpenBookData("hazyresearch/based_triviaqa")
nq = OpenBookData("hazyresearch/based_nq_2048")
drop = OpenBookData("hazyresearch/based_drop")


def documents_of(row: dict[str, Any], tokenizer: Any, lengths: Any) -> Iterator[dict[str, Any]]:
    """The prompts of a question, one for each length; none where all answers are empty."""
    question, answers = row["question"].strip(), [answer for answer in row["answers"] if answer.strip()]
    passage = re.sub(r"\[(PAR|DOC|TLE)\]", "", row["context"]).strip()
    while question and passage.lower().endswith(question.lower()):
        passage = passage[: -len(question)].strip()
    for length in lengths if answers else ():
        cut = around_answer(passage, answers, tokenizer, length - ROOM)
        yield {"input": f"{cut.strip('.')}. {question}", "outputs": answers, "max_length": length}


def around_answer(passage: str, answers: list[str], tokenizer: Any, length: int) -> str:
    """At most `length` tokens of a passage, around the first mention of an answer, or else the first ones."""
    mentions = [re.search(re.escape(answer), passage, re.IGNORECASE) for answer in answers]
    found = min((mention.start() for mention in mentions if mention), default=0)
    encoded = tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    if len(spans) <= length:
        return passage
    middle = next(number for number, (_, end) in enumerate(spans) if end > found)
    start = min(max(0, middle - length // 2), len(spans) - length)
    return passage[spans[start][0] : spans[start + length - 1][1]].strip()


def contains(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{length: 1.0 if an answer occurs in the model's output, ignoring case}."""
    said = results[0].lower()
    return {str(document["max_length"]): float(any(answer.lower() in said for answer in document["outputs"]))}
