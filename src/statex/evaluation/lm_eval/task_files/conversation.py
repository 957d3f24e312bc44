"""CoQA (arXiv 1808.07042) for lm-eval: the last question of a conversation about a story, all turns before it given.

The prompt and the items are those of lm-eval's own coqa, which does not load beside transformers 5 (it imports
transformers.data.metrics, which is gone). Exact match and F1 are SQuAD's, against each of the human answers in turn,
as CoQA counts: the best of the others, averaged over the one that is left out.
"""

import re
import string
from collections import Counter
from typing import Any


def text_of(document: dict[str, Any]) -> str:
    """The story, then all questions with their answers, except for the last question's."""
    questions, answers = document["questions"]["input_text"], document["answers"]["input_text"]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions[:-1], answers, strict=False)]
    return f"{document['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def answers_of(document: dict[str, Any]) -> list[str]:
    """People's answers to the last question, each wording once."""
    given = [document["answers"], *(document.get("additional_answers") or {}).values()]
    last = len(document["questions"]["input_text"]) - 1
    wordings: dict[str, str] = {}
    for answer in given:
        wordings.setdefault(answer["input_text"][last].lower(), answer["input_text"][last])
    return list(wordings.values())


def scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{"em", "f1"}: 0 to 1."""
    said, answers = words_of(results[0].strip().split("\n")[0]), [words_of(answer) for answer in answers_of(document)]
    rest = [answers[:place] + answers[place + 1 :] for place in range(len(answers))] if len(answers) > 1 else [answers]
    return {
        "em": sum(max(float(answer == said) for answer in some) for some in rest) / len(rest),
        "f1": sum(max(overlap(answer, said) for answer in some) for some in rest) / len(rest),
    }


def words_of(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    plain = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def overlap(one: list[str], other: list[str]) -> float:
    """F1 of two bags of words; two empty ones are the same."""
    if not one or not other:
        return float(one == other)
    common = (Counter(one) & Counter(other)).total()
    return 2 * common / (len(one) + len(other))
