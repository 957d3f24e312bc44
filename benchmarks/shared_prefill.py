"""What reading a context once for all its questions saves: seconds with and without, and that the scores are the same.

    OMP_NUM_THREADS=1 python benchmarks/shared_prefill.py MODEL --lengths 1024,4096 --keys 4

Asks the suite niah_multikey: once as the suite does (shared), once with a context of its own for each question
(separate). Both ways run in turn; the first round is not counted, of the others the median is printed.
"""

import argparse
import statistics
import time

from statex.checkpoint import load, load_tokenizer
from statex.evaluation.context import Context
from statex.evaluation.prompts.needles import Prompt, score_prompts
from statex.evaluation.reader import Reader
from statex.evaluation.suite import Cell
from statex.evaluation.suites.niah_multikey import TASK
from statex.models.dispatch import statex_ops
from statex.recipe import Evaluation
from statex.settings import TextSource
from statex.utils.environment import default_device, device_name, source_commit, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default="1024,2048,4096")
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    network = load(options.model).to(default_device()).eval()
    settings = Evaluation.model_validate({"niah_multikey": {"num_keys": options.keys, "num_items": options.items}})
    source = TextSource(standard_library=True)
    context = Context(Reader(network), load_tokenizer(options.model), settings, source, source)
    print(f"{device_name(network.device)}; commit {source_commit()}; {versions()}")
    print("length  shared s  separate s  ratio  largest difference of a score")
    with statex_ops():
        for length in map(int, options.lengths.split(",")):
            measure(context, length, options.max_new_tokens, options.repetitions)


def measure(context: Context, length: int, max_new_tokens: int, repetitions: int) -> None:
    cell = Cell(f"length-{length}", {"length": length})
    shared = TASK.prompts(context, cell)
    separate = [Prompt(one.context, (question,)) for one in shared for question in one.questions]
    seconds: dict[str, list[float]] = {"shared": [], "separate": []}
    scores = {}
    for repetition in range(repetitions + 1):
        for name, prompts in (("shared", shared), ("separate", separate)):
            start = time.perf_counter()
            scores[name] = score_prompts(context, "niah_multikey", cell, prompts, max_new_tokens)
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    worst = max(
        abs(one.scores[metric] - other.scores[metric])
        for one, other in zip(scores["shared"], scores["separate"], strict=True)
        for metric in one.scores
    )
    one, other = (statistics.median(seconds[name]) for name in ("shared", "separate"))
    print(f"{length:>6}  {one:8.2f}  {other:10.2f}  {other / one:5.2f}  {worst:.1e}")


if __name__ == "__main__":
    main()
