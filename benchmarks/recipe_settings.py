"""Which settings make pre-training learn recall, over many seeds: the trials behind the recipes' own settings.

Each trial is a run of a recipe with one model, one seed and some changed keys, in a process of its own with one thread.
`--pretraining` stops after it and measures recall of the pre-trained model; without it all arms are post-trained too. A
table goes to standard output, all numbers as JSON lines to `--out`.

    python benchmarks/recipe_settings.py --seeds 100-109 --processes 2 --pretraining --variant "mamba2" \
        --variant "mamba2 models.mamba2.config.initializer_range=0.2"
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"


def trial(path: Path, variant: str, seed: int, pretraining: bool, folder: str) -> dict:
    """Run a recipe with one model and seed; recall by arm and number of pairs, text NLL, and seconds."""
    os.environ |= {"OMP_NUM_THREADS": "1"}
    import torch

    from statex.recipe import apply_override, parse_recipe
    from statex.run import chains_of, run_chain
    from statex.run.collect import collect_results
    from statex.run.preflight import prepare_run

    torch.set_num_threads(1)
    model, *changes = variant.split()
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    if files := values.get("data", {}).get("text", {}).get("files"):
        values["data"]["text"]["files"] = [str(path.parent.absolute() / name) for name in files]
    values |= {"seeds": [seed], "workers": 1, "output": tempfile.mkdtemp(dir=folder), "name": "trial"}
    values["models"] = {model: copy.deepcopy(values["models"][model])}
    values["evaluation"] |= {"suites": ["mqar", "nll_by_position"]}
    if pretraining:
        values["arms"] = {"base": {"kind": "base"}}
    for change in changes:
        apply_override(values, change)
    start = time.perf_counter()
    recipe = parse_recipe(values)
    prepare_run(recipe)
    for chain in chains_of(recipe):
        run_chain(recipe, chain, True, lambda *_: None)
    rows = [row for row in collect_results(recipe) if row.seed == seed]
    recall: dict[str, dict[int, float]] = {}
    text = {}
    for row in rows:
        if row.suite == "mqar" and row.metric == "accuracy":
            recall.setdefault(row.arm, {})[row.slice["num_pairs"]] = row.value
        if row.suite == "nll_by_position" and not row.slice:
            text[row.arm] = row.value
    seconds = time.perf_counter() - start
    return {"variant": variant, "seed": seed, "recall": recall, "text": text, "seconds": round(seconds)}


def show(trials: list[dict]) -> None:
    """Per variant and arm: recall at the fewest and the most pairs, seed by seed; how many seeds left the plateau."""
    for variant in dict.fromkeys(one["variant"] for one in trials):
        some = sorted((one for one in trials if one["variant"] == variant), key=lambda one: one["seed"])
        print(f"\n{variant}    ({statistics.mean(one['seconds'] for one in some):.0f} s a trial)")
        for arm in some[0]["recall"]:
            fewest, most = min(some[0]["recall"][arm]), max(some[0]["recall"][arm])
            cells = [(one["recall"][arm][fewest], one["recall"][arm][most]) for one in some]
            learnt = f"{sum(easy >= 0.9 for easy, _ in cells)}/{len(cells)} at 0.9 of {fewest} pairs"
            text = statistics.mean(one["text"].get(arm, float("nan")) for one in some)
            listed = "  ".join(f"{easy:.2f}/{hard:.2f}" for easy, hard in cells)
            hard = statistics.mean(hard for _, hard in cells)
            print(f"  {arm:9} {learnt}, mean at {most} pairs {hard:.3f}, text {text:.3f}   {listed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="default: the demo's")
    parser.add_argument("--variant", action="append", required=True, help="a model and changed keys, key=value")
    parser.add_argument("--seeds", default="100-109", help="first-last")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pretraining", action="store_true", help="no arms: the pre-trained model alone")
    parser.add_argument("--out", type=Path, default=Path("runs/settings.jsonl"))
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    trials = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.processes, max_tasks_per_child=1) as pool,
        options.out.open("a", encoding="utf-8") as out,
    ):
        waiting = [
            pool.submit(trial, options.recipe, variant, seed, options.pretraining, folder)
            for variant in options.variant
            for seed in range(first, last + 1)
        ]
        for future in as_completed(waiting):
            trials.append(future.result())
            print(json.dumps(trials[-1]), file=out, flush=True)
            print(f"{len(trials)}/{len(waiting)}", end="\r", file=sys.stderr)
    show(trials)


if __name__ == "__main__":
    main()
