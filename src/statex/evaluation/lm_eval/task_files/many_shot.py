"""Many-shot classification in the manner of HELMET (arXiv 2410.02694), for lm-eval: TREC, BANKING77, CLINC150.

Labels become arbitrary numbers, which only the examples explain; examples cycle through the labels. The number of
shots, in `num_shots`, is in the metric's name (exact match of the label's number). Two things are not HELMET's: the
prompt has no instruction, which models that are not tuned do not need, and where there are fewer shots than labels the
question's own label is always among those shown, so that every question can be answered.

`metadata` takes `num_shots`, `num_items` (questions, drawn from the test split) and `data` (a folder in the hub's
form).
"""

from typing import Any

import numpy as np

from statex.errors import UserError

DEFAULT_SHOTS = (16, 64, 256, 512)
DEFAULT_ITEMS = 500
SEED = 1234


class ManyShotData:
    """A data set on the hub, which lm-eval calls for its documents.

    Args:
        path, subset: its name and configuration on the hub.
        labels: names of its column of labels, of which the first that exists is read: copies name it differently.
        questions: the split with the questions.
    """

    def __init__(self, path: str, subset: str | None, *labels: str, questions: str = "test"):
        self.DATASET_PATH, self.DATASET_NAME = path, subset  # as lm-eval calls them
        self.labels, self.questions = labels, questions

    def __call__(self, **metadata: Any) -> dict:
        """{"test": documents}, every question once for each number of shots, with examples of its own."""
        import datasets

        where = (metadata["data"], None) if metadata.get("data") else (self.DATASET_PATH, self.DATASET_NAME)
        data = datasets.load_dataset(*where)
        examples, questions = (
            [(row["text"], self._label(row, where[0])) for row in data[split]] for split in ("train", self.questions)
        )
        chosen = np.random.default_rng(SEED).permutation(len(questions))[: metadata.get("num_items") or DEFAULT_ITEMS]
        asked = [questions[place] for place in sorted(chosen)]
        documents = documents_of(examples, asked, metadata.get("num_shots") or DEFAULT_SHOTS)
        return {"test": datasets.Dataset.from_list(documents)}

    def _label(self, row: dict[str, Any], data: str) -> Any:
        """The label of a row.

        Raises:
            UserError: there is no column of labels.
        """
        for name in self.labels:
            if name in row:
                return row[name]
        problem = f"has none of the columns {', '.join(self.labels)}, but {', '.join(row)}"
        raise UserError("evaluation.harness.data", data, problem, "rename the column of labels to one of these")


# HELMET's own loader (data.py, load_icl) names CogComp/trec, PolyAI/banking77 and clinc_oos. The first two are loading
# scripts, which datasets refuses since version 4, so the same data is taken from copies in plain files.
trec_coarse = ManyShotData("SetFit/TREC-QC", None, "label_coarse")  # 6 labels; 5452 examples, 500 questions
trec_fine = ManyShotData("SetFit/TREC-QC", None, "label_fine", "label")  # 50 labels
banking77 = ManyShotData("mteb/banking77", None, "label")  # MTEB's copy of PolyAI/banking77, without some duplicates
clinc150 = ManyShotData("clinc/clinc_oos", "plus", "intent", questions="validation")  # 151 labels, HELMET's split


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
