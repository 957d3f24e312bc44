"""Many-shot classification in the manner of HELMET (arXiv 2410.02694), for lm-eval: TREC, BANKING77, CLINC150.

Labels become arbitrary numbers, which only the examples explain; examples cycle through the labels. The number of
shots, in `num_shots`, is in the metric's name (exact match of the label's number). Two things are not HELMET's: the
prompt has no instruction, which models that are not tuned do not need, and where there are fewer shots than labels the
question's own label is always among those shown, so that every question can be answered.

`metadata` takes `num_shots`, `num_items` (questions, drawn from the test split) and `data` (a folder in the hub's
form).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from statex.errors import UserError

DEFAULT_SHOTS = (16, 64, 256, 512)
DEFAULT_ITEMS = 500
SEED = 1234


@dataclass(frozen=True)
class Source:
    """A data set on the hub: its name and configuration, its column of labels, and the split that is asked about.

    Copies name the column differently: the first name in `labels` that exists is read.
    """

    path: str
    subset: str | None
    labels: tuple[str, ...]
    questions: str = "test"


# HELMET's own loader (data.py, load_icl) names CogComp/trec, PolyAI/banking77 and clinc_oos. The first two are loading
# scripts, which datasets refuses since version 4, so the same data is taken from copies in plain files.
TREC_COARSE = Source("SetFit/TREC-QC", None, ("label_coarse",))  # its prepare.py: 6 coarse labels,
TREC_FINE = Source(
    "SetFit/TREC-QC", None, ("label_fine", "label")
)  # 50 fine ones; 5452 questions for training, 500 for testing
BANKING77 = Source(
    "mteb/banking77", None, ("label",)
)  # MTEB's copy of PolyAI/banking77; some duplicates are gone from it
CLINC150 = Source("clinc/clinc_oos", "plus", ("intent",), "validation")  # parquet; 151 labels, HELMET's split


def trec_coarse(**metadata: Any) -> dict:
    return build(TREC_COARSE, metadata)


def trec_fine(**metadata: Any) -> dict:
    return build(TREC_FINE, metadata)


def banking77(**metadata: Any) -> dict:
    return build(BANKING77, metadata)


def clinc150(**metadata: Any) -> dict:
    return build(CLINC150, metadata)


for function, source in (
    (trec_coarse, TREC_COARSE), (trec_fine, TREC_FINE), (banking77, BANKING77), (clinc150, CLINC150),
):  # fmt: skip
    function.DATASET_PATH, function.DATASET_NAME = source.path, source.subset  # type: ignore[attr-defined]


def build(source: Source, metadata: dict[str, Any]) -> dict:
    """{"test": documents}, every question once for each number of shots, with examples of its own."""
    import datasets

    where = (metadata["data"], None) if metadata.get("data") else (source.path, source.subset)
    data = datasets.load_dataset(*where)
    examples, questions = (
        [(row["text"], _label(row, source, where[0])) for row in data[split]] for split in ("train", source.questions)
    )
    chosen = np.random.default_rng(SEED).permutation(len(questions))[: metadata.get("num_items") or DEFAULT_ITEMS]
    shots = metadata.get("num_shots") or DEFAULT_SHOTS
    return {
        "test": datasets.Dataset.from_list(
            documents_of(examples, [questions[place] for place in sorted(chosen)], shots)
        )
    }


def _label(row: dict[str, Any], source: Source, data: str) -> Any:
    """The label of a row.

    Raises:
        UserError: there is no column of labels.
    """
    for name in source.labels:
        if name in row:
            return row[name]
    problem = f"has none of the columns {', '.join(source.labels)}, but {', '.join(row)}"
    raise UserError("evaluation.harness.data", data, problem, "rename the column of labels to one of these")


def documents_of(examples: list[tuple], questions: list[tuple], shots: list[int] | tuple[int, ...]) -> list[dict]:
    """A prompt for each question and each number of shots: numbered labels, examples, the question."""
    labels = sorted({label for _, label in [*examples, *questions]}, key=str)
    by_label: dict[Any, list[str]] = {label: [] for label in labels}
    for text, label in examples:
        by_label[label].append(text)
    documents = []
    for number, (text, label) in enumerate(questions):
        for count in shots:
            generator = np.random.default_rng([SEED, count, number])
            names = dict(zip(labels, generator.permutation(len(labels)).tolist(), strict=True))
            others = [labels[place] for place in generator.permutation(len(labels)) if labels[place] != label]
            turns = [one for one in (label, *others) if by_label[one]][:count]
            shown = ""
            for place in generator.permutation(count):
                example = turns[place % len(turns)]
                shown += f"{generator.choice(by_label[example])}\nlabel: {names[example]}\n\n"
            documents.append({"input": f"{shown}{text}\nlabel:", "outputs": [str(names[label])], "shots": count})
    return documents


def exact(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{"shots_<number>": 1.0 if the model said the label's number}."""
    return {f"shots_{document['shots']}": float(results[0].strip() == document["outputs"][0])}
