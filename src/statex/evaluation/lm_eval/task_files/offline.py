"""Our offline suites for lm-eval, so that its users can ask any model the same: seeded items, built from local text.

`metadata` takes `tokenizer` (a path), `max_seq_lengths`, `num_items`, `seed` and `text`, a recipe's text source, by
default Python's standard library. MQAR, AR-hits and NLL by position have no counterpart in lm-eval's requests.
"""

from functools import partial
from itertools import zip_longest
from typing import Any, cast

import numpy as np

from statex.checkpoint import read_tokenizer
from statex.evaluation.context import Context
from statex.evaluation.lm_eval.loading import LENGTHS
from statex.evaluation.prompts.grids import grid_depths
from statex.evaluation.prompts.needle_suite import NeedleTask
from statex.evaluation.prompts.needles import Prompt
from statex.evaluation.suite import Cell
from statex.evaluation.suites import (
    niah_multikey,
    niah_single_1,
    niah_single_2,
    niah_single_3,
    passkey,
    symbol_icl,
    variable_tracking,
)
from statex.recipe import Evaluation
from statex.settings import TextSource

DEFAULT_ITEMS = 20


def _context(metadata: dict[str, Any], suite: str) -> Context:
    """A context that builds prompts only: it has no model."""
    tokenizer = read_tokenizer(metadata.get("tokenizer") or metadata["pretrained"])
    text = TextSource.model_validate(metadata.get("text") or {"standard_library": True})
    settings = {"num_items": metadata["num_items"]} if "num_items" in metadata else {}
    seed = {"seed": metadata["seed"]} if "seed" in metadata else {}
    evaluation = Evaluation.model_validate({suite: settings} | seed)
    return Context(cast(Any, None), tokenizer, evaluation, text, text)


def _grid(context: Context, suite: str, metadata: dict[str, Any]) -> list[Cell]:
    """A cell for each length and, where the suite has depths, each depth."""
    lengths = metadata.get("max_seq_lengths") or LENGTHS
    if (num_depths := getattr(context.settings(suite), "num_depths", None)) is None:
        return [Cell("", {"length": length}) for length in lengths]
    depths = grid_depths(num_depths)
    return [Cell("", {"length": length, "depth": depth}) for length in lengths for depth in depths]


def _documents(prompts: list[Prompt], cell: Cell) -> list[dict[str, Any]]:
    return [
        {
            "input": prompt.context + question.text,
            "outputs": list(question.answers),
            "max_length": cell.slice["length"],
            "depth": (cell.slice | question.slice).get("depth", -1.0),
        }
        for prompt in prompts
        for question in prompt.questions
    ]


def _data_set(cells: list[list[dict[str, Any]]]) -> dict:
    """All cells' documents, interleaved so that lm-eval's `--limit`, which takes the first ones, takes some of each."""
    import datasets

    turns = [one for turn in zip_longest(*cells) for one in turn if one is not None]
    return {"test": datasets.Dataset.from_list(turns)}


def _needles(task: NeedleTask, **metadata: Any) -> dict:
    context = _context(metadata, task.name)
    cells = _grid(context, task.name, metadata)
    return _data_set([_documents(task.prompts(context, cell), cell) for cell in cells])


single_1 = partial(_needles, niah_single_1.TASK)
single_2 = partial(_needles, niah_single_2.TASK)
single_3 = partial(_needles, niah_single_3.TASK)
multikey = partial(_needles, niah_multikey.TASK)
tracking = partial(_needles, variable_tracking.TASK)


def passkeys(**metadata: Any) -> dict:
    context = _context(metadata, "passkey")
    cells = _grid(context, "passkey", metadata)
    return _data_set(
        [
            [
                {
                    "input": context.tokenizer.decode(
                        item.prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ),
                    "outputs": [item.passkey],
                    "max_length": cell.slice["length"],
                    "depth": cell.slice["depth"],
                }
                for item in passkey.build_items(context, cell)
            ]
            for cell in cells
        ]
    )


def symbols(**metadata: Any) -> dict:
    """One question for each kind of symbol, each number of shots and each context; choices are the labels."""
    shots = metadata.get("num_shots") or (0, 4, 16, 64, 256)
    documents = []
    for number in range(metadata.get("num_items", DEFAULT_ITEMS)):
        generator = np.random.default_rng([metadata.get("seed", 1234), number])
        task = symbol_icl.build_task(generator, 4, max(shots))
        for count in shots:
            choices = sorted(set(task.labels.values()))
            for kind, symbol, label in task.queries(generator, count, 1):
                documents.append(
                    {
                        "input": task.shown(count) + symbol_icl.QUERY.format(symbol=symbol),
                        "choices": choices,
                        "label": choices.index(label),
                        "shots": count,
                        "symbols": kind,
                    }
                )
    return _data_set([documents])


def likeliest(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """{"shots_<number>_<seen or unseen>": 1.0 if the right label had the highest log-likelihood}."""
    values = [log_likelihood for log_likelihood, _ in results]
    right = values.index(max(values)) == document["label"]
    return {f"shots_{document['shots']}_{document['symbols']}": float(right)}


def found(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """{length: the share of the answers that occur in the model's output, ignoring case}."""
    said = results[0].lower()
    answers = document["outputs"]
    return {str(document["max_length"]): sum(answer.lower() in said for answer in answers) / len(answers)}
