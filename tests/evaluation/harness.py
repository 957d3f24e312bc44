"""Asking lm-eval's tasks with the settings of a recipe given as keywords."""

from statex.evaluation import Request
from statex.recipe import Evaluation
from statex.settings import TextSource


def run_harness(model, tokenizer, names, *, output=None, metadata=None, data=None, **settings):
    """`metadata["text"]` is the request's text."""
    from statex.evaluation.lm_eval import run_harness

    metadata = dict(metadata or {})
    text = TextSource(**metadata.pop("text")) if "text" in metadata else None
    settings |= {} if data is None else {"data": str(data)}
    request = Request(Evaluation.model_validate({"batch_size": 8, "harness": settings}), output=output, text=text)
    return run_harness(model, tokenizer, names, request, metadata)
