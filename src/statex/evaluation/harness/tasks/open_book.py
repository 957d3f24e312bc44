"""Open-book question answering as in Based (arXiv 2402.18668) and JRT (arXiv 2407.05483), for lm-eval.

The passage is cut to a number of tokens around the answer, then the question follows, and the answer counts if it
occurs in what the model says (`contains`). lm-eval's own triviaqa, nq_open and drop are closed-book, or give the whole
passage. The length, in `max_seq_lengths`, names the metric, as in lm-eval's RULER tasks.
"""

import re
from collections.abc import Iterator
from typing import Any

DEFAULT_LENGTHS = (512, 1024, 2048)
TRIVIAQA, NQ, DROP = "hazyresearch/based_triviaqa", "hazyresearch/based_nq_2048", "hazyresearch/based_drop"


def triviaqa(**metadata: Any) -> dict:
    return build(TRIVIAQA, metadata)


def nq(**metadata: Any) -> dict:
    return build(NQ, metadata)


def drop(**metadata: Any) -> dict:
    return build(DROP, metadata)


triviaqa.DATASET_PATH, nq.DATASET_PATH, drop.DATASET_PATH = TRIVIAQA, NQ, DROP  # type: ignore[attr-defined]


def build(path: str, metadata: dict[str, Any]) -> dict:
    """{"test": documents} of a data set with `context`, `question` and `answers`; one for each length."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(metadata.get("tokenizer") or metadata["pretrained"])
    rows = datasets.load_dataset(metadata.get("data") or path, split="validation")
    lengths = metadata.get("max_seq_lengths") or DEFAULT_LENGTHS
    documents = [document for length in lengths for document in documents_of(rows, tokenizer, length)]
    return {"test": datasets.Dataset.from_list(documents)}


def documents_of(rows: Any, tokenizer: Any, length: int) -> Iterator[dict[str, Any]]:
    """Prompts with a passage of at most `length` tokens; questions whose passage lacks the answer are left out."""
    for row in rows:
        question, answers = row["question"].strip(), [answer for answer in row["answers"] if answer.strip()]
        passage = re.sub(r"\[(PAR|DOC|TLE)\]", "", row["context"]).strip().removesuffix(question).strip()
        cut = around_answer(passage, answers, tokenizer, length)
        if cut is not None:
            yield {"input": f"{cut.rstrip('.')}. {question}", "outputs": answers, "max_length": length}


def around_answer(passage: str, answers: list[str], tokenizer: Any, length: int) -> str | None:
    """At most `length` tokens of a passage with its first mention of an answer in their middle; None without any."""
    places = [passage.lower().find(answer.lower()) for answer in answers]
    found = min((place for place in places if place >= 0), default=None)
    if found is None:
        return None
    encoded = tokenizer(passage, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = encoded["offset_mapping"]
    if len(spans) <= length:
        return passage
    middle = next(number for number, (_, end) in enumerate(spans) if end > found)
    start = min(max(0, middle - length // 2), len(spans) - length)
    return passage[spans[start][0] : spans[start + length - 1][1]].strip()


def contains(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{length: 1.0 if an answer occurs in what the model said, whatever its case}."""
    said = results[0].lower()
    return {str(document["max_length"]): float(any(answer.lower() in said for answer in document["outputs"]))}
