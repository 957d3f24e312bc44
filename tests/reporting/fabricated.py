"""FABRICATED results, made up by this file, to test the report. Nothing here was measured."""

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from statex.results import Result, read_results, write_results

RECIPE = """\
# fabricated, for the tests of the report
name = "fabricated"
seeds = {seeds}

{models}

[arms.base]
kind = "base"
[arms.lpt]
kind = "lpt"
[arms.reinit]
kind = "statex"
expansion = {{ every = 2, init = "reinit" }}
[arms.preserve]
kind = "statex"
expansion = {{ every = 2, init = "preserve" }}
[arms.control]
kind = "control"

[training]
steps = 2000
tokens_per_step = 4096
sequence_length = 512

[evaluation]
suites = ["mqar", "passkey", "ar_hits", "nll_by_position"]
"""
FAMILIES = {"gla": "statex_gla", "mamba2": "mamba2"}
ARMS = ["base", "lpt", "reinit", "preserve", "control"]
# Recall at 32 pairs, paired with lpt, per model and arm
RECALL = {
    "gla": {"base": 0.21, "lpt": 0.42, "reinit": 0.69, "preserve": 0.72, "control": 0.40},
    "mamba2": {"base": 0.18, "lpt": 0.66, "reinit": 0.64, "preserve": 0.81, "control": 0.52},
}
NLL = {"base": 1.78, "lpt": 1.640, "reinit": 1.702, "preserve": 1.631, "control": 1.713}
WHERE = {"device": "Fabricated Processor, 2 threads", "commit": "0123456789ab"}
VERSIONS = {"python": "3.12.0", "torch": "2.13.0", "transformers": "5.23.0", "statex": "0.1.0"}


def fabricated_run(
    folder: Path,
    seeds: tuple[int, ...] = (0,),
    models: tuple[str, ...] = ("gla", "mamba2"),
    without: tuple[str, ...] = (),
    extra: bool = False,
) -> Path:
    """Write a made-up run into `folder`; `without` names suites or arms to leave out, `extra` adds optional suites."""
    folder.mkdir(parents=True, exist_ok=True)
    origins = "\n".join(f'[models.{model}]\nfamily = "{FAMILIES[model]}"' for model in models)
    (folder / "recipe.toml").write_text(RECIPE.format(seeds=list(seeds), models=origins), encoding="utf-8")
    rows = [row for row in _rows(seeds, models, extra) if not {row.suite, row.arm} & set(without)]
    write_results(folder / "results.jsonl", rows)
    return folder


def rewrite(folder: Path, change) -> list[Result]:
    """Pass every result of a run through `change`, which returns it changed or None to drop it."""
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [changed for row in rows if (changed := change(Result(**row))) is not None]
    write_results(folder / "results.jsonl", kept)
    return kept


def _rows(seeds: tuple[int, ...], models: tuple[str, ...], extra: bool) -> Iterator[Result]:
    yield Result("run", "versions", 0.0, details=VERSIONS, **WHERE)
    numbers: list[int | None] = list(seeds) + ([None] if len(seeds) > 1 else [])
    for model in models:
        for seed in numbers:
            noise = random.Random(f"{model} {seed}")
            for arm in ARMS:
                common = {"model": model, "arm": arm, "seed": seed, **WHERE}
                yield from _quality(model, arm, noise, common)
                if extra:
                    yield from _extra(arm, noise, common)
                if seed is not None:
                    yield from _state_and_cost(model, arm, noise, common)
                    yield from _diagnosis(arm, noise, common)
            if seed is numbers[-1]:
                yield from _failures(model, seed)


def _with_difference(
    suite, metric, value, reference, half, n, where, common, unit="fraction", note=""
) -> Iterator[Result]:
    """A value and, except for lpt, its paired difference from lpt."""
    bounds = (max(0.0, value - half), min(1.0, value + half) if unit == "fraction" else value + half)
    yield Result(suite, metric, value, unit, *bounds, n, where, note=note, **common)
    if common["arm"] != "lpt":
        change = value - reference
        power = {"detectable": 1.43 * half, "items": None, "seeds": None}
        yield Result(
            suite, metric, change, unit, change - half, change + half, n, where, baseline="lpt", note=note,
            details={"power": power}, **common,
        )  # fmt: skip


def _quality(model, arm, noise, common) -> Iterator[Result]:
    for pairs, length in ((4, 16), (8, 32), (16, 64), (32, 128)):
        ease = math.log2(32 / pairs) / 3
        value, reference = (RECALL[model][one] + (0.97 - RECALL[model][one]) * ease for one in (arm, "lpt"))
        where = {"num_pairs": pairs, "length": length}
        yield from _with_difference("mqar", "accuracy", value, reference, 0.045, 200, where, common)
    for length in (256, 512, 1024):
        for depth in (0.1, 0.3, 0.5, 0.7, 0.9):
            strength = RECALL[model][arm] * (0.5 + depth / 2) * 512 / (length + 256)
            where = {"length": length, "depth": depth}
            value = min(1.0, round(strength * 20) / 20) if model == "gla" else round(strength * 2) / 20
            bounds = (max(0.0, value - 0.15), min(1.0, value + 0.15))
            yield Result("passkey", "accuracy", value, "fraction", *bounds, 20, where, **common)
            nll = 3.5 - 2.5 * strength
            yield Result("passkey", "answer_nll", nll, "nats", nll - 0.3, nll + 0.3, 20, where, **common)
        value, reference = (RECALL[model][one] * 0.7 * 512 / (length + 256) for one in (arm, "lpt"))
        yield from _with_difference("passkey", "accuracy", value, reference, 0.08, 100, {"length": length}, common)
    level, reference = NLL[arm], NLL["lpt"]
    text = {"n": 100, "where": {}, "common": common, "unit": "nats", "half": 0.009}
    yield from _with_difference("ar_hits", "nll", level, reference, **text)
    yield from _with_difference("ar_hits", "hit_nll", level - 0.7, reference - 0.7, **text)
    yield from _with_difference("ar_hits", "other_nll", level + 0.2, reference + 0.2, **text)
    yield from _with_difference("ar_hits", "long_gap_nll", level - 0.5, reference - 0.5, **text)
    yield Result("ar_hits", "hit_share", 0.1234, "fraction", 0.118, 0.129, 100, {}, **common)
    for start in range(0, 1024, 128):
        where = {"from": start, "to": start + 128}
        fall = 0.25 * math.exp(-start / 200) + noise.uniform(-0.004, 0.004)
        past = "past the training length" if start >= 512 else ""
        shape = {"n": 100, "where": where, "common": common, "unit": "nats", "half": 0.02, "note": past}
        yield from _with_difference("nll_by_position", "nll", level + fall, reference + fall, **shape)
    yield from _with_difference("nll_by_position", "nll", level + 0.04, reference + 0.04, **text)


def _state_and_cost(model, arm, noise, common) -> Iterator[Result]:
    expanded = arm in ("reinit", "preserve")
    shape = {"num_heads": 4, "key_dim": 8, "value_dim": 16}
    total = 0
    for layer in range(4):
        grown = expanded and layer % 2 == 0
        elements = 2048 if grown else 512
        total += elements
        details = shape | ({"key_dim": 32} if grown else {}) | {"elements_before": 512}
        yield Result("state", "state_elements", elements, "elements", slice={"layer": layer}, details=details, **common)
    fresh = {"reinit": 28_416, "preserve": 28_672, "control": 28_416}.get(arm, 0)
    counts = {
        "state_elements": total,
        "parameters": 103_424 + (29_184 if arm == "preserve" else 0),
        "fresh_parameters": fresh,
    }
    for metric, value in counts.items():
        yield Result("state", metric, value, "elements", **common)
    yield Result("state", "state_bytes", total * 4, "bytes", **common)
    if arm != "base":
        yield Result("cost", "training_tokens_per_second", 21_500 * noise.uniform(0.9, 1.1), "tokens/s", **common)
        yield Result("cost", "training_peak_memory", 812_000_000, "bytes", **common)
        yield Result("cost", "training_data_wait", 0.004, "fraction", **common)
        yield Result("cost", "seconds", 48.3, "s", slice={"stage": "train"}, **common)
    yield Result("cost", "seconds", 21.9, "s", slice={"stage": "evaluate"}, **common)
    if arm == "base":
        yield Result("cost", "seconds", 131.0, "s", slice={"stage": "pretrain"}, **common)
    yield Result(
        "cost", "prefill_tokens_per_second", 55_000.0, "tokens/s", 54_000.0, 56_000.0, 5, {"length": 512}, **common
    )
    yield Result("cost", "decode_ms_per_token", 3.21, "ms", 3.1, 3.3, 5, {"batch": 1}, **common)


def _diagnosis(arm, noise, common) -> Iterator[Result]:
    """Layers 0 and 2 are expanded; one tensor of `preserve` never moved."""
    if arm not in ("reinit", "preserve", "control"):
        return
    for layer in (0, 2):
        where = {"layer": layer}
        note = f"not moved at all: layers.{layer}.q_proj.weight" if (arm, layer) == ("preserve", 2) else ""
        moved = noise.uniform(0.3, 0.5)
        yield Result("diagnostics", "weight_change", moved, slice=where, note=note, **common)
        if arm == "control":
            continue
        share = noise.uniform(0.2, 0.6)
        energy = {"unit": "fraction", "low": share - 0.02, "high": share + 0.02, "details": {"share_of_entries": 0.75}}
        yield Result("diagnostics", "new_state_energy", share, n=32, slice=where, **energy, **common)
        for metric, rank in (("effective_rank", 5.5), ("effective_rank_without_new_state", 3.25)):
            yield Result("diagnostics", metric, rank, low=rank - 0.2, high=rank + 0.2, n=32, slice=where, **common)
    for step in (0, 50, 100) if arm != "control" else ():
        for metric, value, unit in (("new_state_energy", 0.1 + step / 400, "fraction"), ("effective_rank", 5.0, "")):
            yield Result("diagnostics", f"{metric}_in_training", value, unit, n=1, slice={"step": step}, **common)
    if arm != "control":
        yield Result("diagnostics", "nll_rise_without_new_state", 0.05, "nats", 0.04, 0.06, 32, **common)
        where = {"num_pairs": 32, "length": 128}
        yield Result("diagnostics", "recall_drop_without_new_state", 0.21, "", 0.18, 0.24, 64, where, **common)


def _failures(model, seed) -> Iterator[Result]:
    """`reinit` loses text in both models; mamba2's recall does not rise."""
    common = {"model": model, "arm": "reinit", "seed": seed, "baseline": "lpt", **WHERE}
    note = "Text NLL changed by +0.062 against lpt (95 % interval +0.053 to +0.071): too many layers."
    yield Result(
        "diagnostics", "text_lost", 0.062, "nats", 0.053, 0.071, 100, {"of": "ar_hits nll"}, note=note, **common
    )
    if model == "mamba2":
        note = "Recall at 32 pairs changed by -0.020 against lpt (95 % interval -0.065 to +0.025): not used."
        where = {"num_pairs": 32, "length": 128, "of": "mqar accuracy"}
        yield Result("diagnostics", "recall_flat", -0.02, "fraction", -0.065, 0.025, 200, where, note=note, **common)


def _extra(arm, noise, common) -> Iterator[Result]:
    for suite in ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey"):
        for length, depth in itertools.product((1024, 2048), (0.25, 0.75)):
            value, where = noise.uniform(0.2, 0.9), {"length": length, "depth": depth}
            yield Result(suite, "accuracy", value, "fraction", value - 0.1, value + 0.1, 20, where, **common)
    for shots in (0, 4, 16, 64):
        for symbols in ("seen", "unseen"):
            value = 0.25 + 0.1 * math.log2(shots + 1) + noise.uniform(-0.02, 0.02)
            where = {"shots": shots, "symbols": symbols}
            yield Result("symbol_icl", "accuracy", value, "fraction", value - 0.05, value + 0.05, 100, where, **common)
    yield Result(
        "variable_tracking", "accuracy", 0.4321, "fraction", 0.35, 0.51, 50, {"length": 1024, "hops": 2}, **common
    )
    yield Result("piqa", "acc", 0.6123, "fraction", 0.59, 0.634, 1838, **common)
    task = {"task": "swde", "reason": "no data on this machine", "command": "hf download hazyresearch/based-swde"}
    yield Result("run", "not_run", 1.0, "tasks", details={"tasks": [task]}, **common)


def evaluated(folder, arm):
    """What `statex eval` writes of one model, from a made-up run."""
    rows = read_results(fabricated_run(folder.with_name(f"{folder.name}-run"), models=("gla",)) / "results.jsonl")
    kept = [
        row for row in rows if row.arm == arm and row.baseline is None and row.suite not in ("state", "diagnostics")
    ]
    folder.mkdir()
    write_results(folder / "results.jsonl", [replace(row, model="a/path", arm="", seed=None) for row in kept])
    (folder / "evaluation.json").write_text(json.dumps({"evaluation": {"batch_size": 3}}))
    return folder
