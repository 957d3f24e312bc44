"""Where the time of a whole model goes: one decoded token and one long prompt, by kernel and by PyTorch operation.

Example: python benchmarks/profile_model.py --out out gla-1.3b mamba2-1.3b
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from statex.benchmarking import model as bench
from statex.models.dispatch import statex_ops
from statex.utils import environment, timing

DECODED = 8  # tokens in one profile


def grouped(run: Callable[[], object], count: int, top: int) -> dict[str, Any]:
    """Microseconds and calls, for one of `count` tokens or prompts, by kernel and by the operation that launched it."""
    run()
    device = environment.default_device()
    watch = timing.Stopwatch(device)
    run()
    wall = watch.seconds()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_cuda else [])
    with profile(activities=activities) as profiler:
        run()
        timing.synchronize(device)
    kernels: list[dict[str, Any]] = []
    operations: list[dict[str, Any]] = []
    for event in profiler.key_averages():
        is_kernel = str(event.device_type).endswith("CUDA")
        taken = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if taken > 0:
            rows = kernels if is_kernel else operations
            rows.append({"name": event.key, "us": taken / count, "calls": event.count / count})
    for rows in (kernels, operations):
        rows.sort(key=lambda row: -row["us"])
    return {
        "wall_us": 1e6 * wall / count,
        "device_us": sum(row["us"] for row in kernels),
        "launches": sum(row["calls"] for row in kernels),
        "kernels": kernels[:top],
        "operations": operations[:top],
    }


def show(title: str, found: dict[str, Any]) -> None:
    print(
        f"\n{title}: {found['wall_us']:.0f} us without the profiler, kernels {found['device_us']:.0f} us, "
        f"{found['launches']:.0f} launches"
    )
    for kind in ("kernels", "operations"):
        print(f" by {kind}:")
        for row in found[kind]:
            print(f"  {row['us']:10.1f} us {row['calls']:7.1f} x  {row['name'][:130]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"default: all of {', '.join(bench.MODELS)}")
    parser.add_argument("--modes", nargs="*", default=["graph", "steps", "read"], help="of statex bench model")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    device = environment.default_device()
    results: dict[str, Any] = {}
    begun = time.perf_counter()
    for name in arguments.models or bench.MODELS:
        expanded = bench._models(name, device)[1]
        for mode in arguments.modes:
            for batch in arguments.batches if mode != "read" else (1,):
                on_cuda = device.type == "cuda"
                tokens = (bench.TOKENS if on_cuda else bench.CPU_TOKENS) if mode == "read" else DECODED
                title = f"{name} expanded, {mode}, batch {batch}"
                try:
                    with statex_ops(), torch.no_grad():
                        run = bench.RUNS[mode](expanded, batch, tokens)
                        results[title] = grouped(run, 1 if mode == "read" else tokens, arguments.top)
                    show(title, results[title])
                except Exception as problem:  # the others are still worth their time
                    results[title] = {"error": str(problem)}
                    print(f"\n{title}: {problem}", flush=True)
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "profile.json").write_text(json.dumps(results, indent=1) + "\n")
        del expanded
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
