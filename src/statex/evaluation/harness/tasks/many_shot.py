"""Many-shot classification in the manner of HELMET (arXiv 2410.02694), for lm-eval: TREC, BANKING77, CLINC150.

Labels become arbitrary numbers, which only the examples explain; examples take turns through the labels. The number of
shots, in `num_shots`, is in the metric's name (exact match of the label's number).
"""

from typing import Any

import numpy as np

DEFAULT_SHOTS = (16, 64, 256, 512)
SEED = 1234
TREC, BANKING77, CLINC150 = ("SetFit/TREC-QC", None), ("mteb/banking77", None), ("clinc/clinc_oos", "plus")


def trec(**metadata: Any) -> dict:
    return build(TREC, "text", "label", metadata)


def banking77(**metadata: Any) -> dict:
    return build(BANKING77, "text", "label", metadata)


def clinc150(**metadata: Any) -> dict:
    return build(CLINC150, "text", "intent", metadata)


for function, source in ((trec, TREC), (banking77, BANKING77), (clinc150, CLINC150)):
    function.DATASET_PATH, function.DATASET_NAME = source  # type: ignore[attr-defined]


def build(source: tuple[str, str | None], text: str, label: str, metadata: dict[str, Any]) -> dict:
    """{"test": documents}, every test question once for each number of shots, with examples of its own."""
    import datasets

    data = datasets.load_dataset(metadata.get("data") or source[0], None if metadata.get("data") else source[1])
    examples = [(row[text], row[label]) for row in data["train"]]
    questions = [(row[text], row[label]) for row in data["test"]]
    shots = metadata.get("num_shots") or DEFAULT_SHOTS
    return {"test": datasets.Dataset.from_list(documents_of(examples, questions, shots))}


def documents_of(examples: list[tuple], questions: list[tuple], shots: list[int] | tuple[int, ...]) -> list[dict]:
    """A prompt for each number of shots and each question: numbered labels, examples, the question."""
    labels = sorted({label for _, label in examples}, key=str)
    by_label = {label: [text for text, other in examples if other == label] for label in labels}
    documents = []
    for count in shots:
        for number, (text, label) in enumerate(questions):
            generator = np.random.default_rng([SEED, count, number])
            names = dict(zip(labels, generator.permutation(len(labels)).tolist(), strict=True))
            shown = ""
            for place in generator.permutation(count):
                example = labels[place % len(labels)]
                shown += f"{generator.choice(by_label[example])}\nlabel: {names[example]}\n\n"
            documents.append({"input": f"{shown}{text}\nlabel:", "outputs": [str(names[label])], "shots": count})
    return documents


def exact(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{"shots_<number>": 1.0 if the model said the label's number}."""
    return {f"shots_{document['shots']}": float(results[0].strip() == document["outputs"][0])}
