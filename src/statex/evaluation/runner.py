"""`evaluate`: run suites on a model, keep every item's scores, and return results with intervals."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from statex.data.tokenizer import prefix_token
from statex.errors import UserError
from statex.evaluation.context import Context, Suite, text_source
from statex.evaluation.reader import Reader
from statex.evaluation.records import Score, read_scores, write_scores
from statex.evaluation.suites import find_suite
from statex.evaluation.summary import summarize
from statex.files import write_whole
from statex.measure import device_name, source_commit
from statex.models.dispatch import statex_ops
from statex.recipe import Evaluation, Recall, TextSource
from statex.results import Result
from statex.results.record import SETTINGS_FILES
from statex.results.suites import split_names


def evaluate(
    model: torch.nn.Module,
    tokenizer: Any,
    evaluation: Evaluation,
    *,
    output: Path | None = None,
    text: TextSource | None = None,
    count_text: TextSource | None = None,
    training_length: int | None = None,
    shared: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    identity: dict[str, Any] | None = None,
) -> list[Result]:
    """Run the suites of `evaluation.suites` and return their results.

    Args:
        model: any causal language model of the Hugging Face interface, on the device it shall run on.
        tokenizer: the model's; None for a model of bare ids, which only some suites can ask.
        output: a folder for the scores of every item, `items/<suite>.jsonl`, and `evaluation.json`, the resolved
            settings; a second call with the same settings continues from there. None keeps nothing.
        text: where held-out documents come from; default: `evaluation.text`, else Python's standard library.
        count_text: whose training part AR-hits counts bigrams in; default: `text`.
        training_length: tokens of a training sequence; figures past it are marked.
        shared: a folder for what the evaluations of several models share: the count table of AR-hits.
        progress: called with the suite's name, the cells done and their number.
        identity: fields of every Result: model, arm, seed, state_bytes.

    Raises:
        UserError: an unknown suite, text or a tokenizer that is missing, text too short for a length, a prompt longer
            than the model can read, or an `output` that was made with other settings.
    """
    suites = [find_suite(name) for name in evaluation.suites]
    text = text_source(evaluation, text)
    reader = Reader(model)
    with statex_ops():
        limit = reader.max_context()
    context = Context(reader, tokenizer, evaluation, text, count_text or text, training_length, limit, shared)
    for suite in suites:
        suite.check(context)
    if output is not None:
        claim_folder(output, settings_of(context))
    facts = {"device": device_name(reader.device), "commit": source_commit()} | (identity or {})
    results = []
    with statex_ops():
        for suite in suites:
            scores = _scores(suite, context, output, progress or (lambda *_: None))
            results += summarize(suite, scores, training_length=training_length, **facts)
    return results


def check_items(
    tokenizer: Any, evaluation: Evaluation, text: TextSource, training_length: int, recall: Recall | None = None
) -> None:
    """Raise what measuring would of the items, as far as it shows without the model and at little cost.

    Args:
        recall: of the recipe, where MQAR is trained.

    Raises:
        UserError: a length without room for its question, text or a document too short for a length, a vocabulary too
            small, keys or values that training never shows, or a tokenizer that lm-eval's tasks cannot use.
    """
    from statex.evaluation.lm_eval.local_data import check_folder  # the harness imports this module

    context = Context(cast(Any, None), tokenizer, evaluation, text, text, training_length, recall=recall)
    suites, tasks = split_names(evaluation.suites)
    for name in suites:
        find_suite(name).check(context)
    if tasks:
        prefix_token(tokenizer)
        if evaluation.harness.data is not None:
            check_folder(Path(evaluation.harness.data))


def _scores(
    suite: Suite, context: Context, output: Path | None, progress: Callable[[str, int, int], None]
) -> list[Score]:
    """The scores of all of a suite's items; cells that are on disk are read, the others scored and written."""
    path = output / "items" / f"{suite.name}.jsonl" if output is not None else None
    scores = read_scores(path) if path is not None and path.exists() else []
    done = {score.item.partition("/")[0] for score in scores}
    cells = suite.cells(context)
    for number, cell in enumerate(cells):
        progress(suite.name, number, len(cells))
        if cell.name in done:
            continue
        scores += suite.score(context, cell)
        if path is not None:
            write_scores(path, scores)
    progress(suite.name, len(cells), len(cells))
    return scores


def settings_of(context: Context) -> dict[str, Any]:
    """Everything the scores depend on, but for the choice of suites: each suite's do not depend on the others."""
    return {
        "evaluation": context.evaluation.model_dump(mode="json", exclude={"suites", "text", "harness", "dtype"}),
        "text": context.text.identity(),
        "count_text": context.count_text.identity(),
        "training_length": context.training_length,
        "model": fingerprint(context.reader.model),
    }


def claim_folder(output: Path, settings: dict[str, Any], name: str = SETTINGS_FILES[0]) -> None:
    """Write the settings to the file `name` in `output`, or check that it was made with the same ones.

    Raises:
        UserError: another model, text or other settings made it.
    """
    settings = json.loads(json.dumps(settings))
    for claim in SETTINGS_FILES:
        if not (output / claim).exists():
            continue
        before = json.loads((output / claim).read_text(encoding="utf-8"))
        for key in settings if claim == name else ("model",):
            if before.get(key) != settings[key]:
                raise UserError(
                    "output", str(output), f"was made with another {_difference(key, before.get(key), settings[key])}",
                    "choose another folder, or remove this one",
                )  # fmt: skip
    if not (output / name).exists():
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / name, json.dumps(settings, indent=2) + "\n")


def _difference(key: str, before: Any, now: Any) -> str:
    """The dotted name of the first value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in now:
            if before.get(inner) != now[inner]:
                return _difference(f"{key}.{inner}", before.get(inner), now[inner])
    return f"{key} ({before!r}, now {now!r})"


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of the model's class, tensor names and shapes, and a sample of each tensor's values."""
    state = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu().numpy()
        state.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return state.hexdigest()[:16]
