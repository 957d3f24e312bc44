"""Training steps over several GPUs of one host, by the project's own trainer on random tokens.

"weak": each GPU has a sequence of 64K tokens of its own, gradients are averaged (DDP, or FSDP2 with --fsdp).
"strong": one sequence of 128K, 256K or 1M tokens is shared by all GPUs, states pass between them; with --segment it is
run in segments of so many tokens, which carry their states. The baseline of a case is the same command with one
process; there "strong" is whole on one GPU, and compiled if --compile says so, which slices and segments are not. A
step in which all activations are computed again (--activation-memory least, the default) takes the same memory and work
on any number of GPUs; "most" lets as many blocks keep theirs as there is room for.

A row is appended to FILE, as a line of JSON, as soon as its case is measured. A case for which a GPU has no memory gets
the row "out of memory" by each process that runs out; several processes then end, since the others would wait.

Example: python benchmarks/scaling.py weak-gla weak-mamba2 --out scaling.jsonl
         torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py weak-gla weak-mamba2 --out scaling.jsonl
         torchrun --standalone --nproc-per-node 2 benchmarks/scaling.py strong-gla-256k --fsdp --out scaling.jsonl
         python benchmarks/scaling.py strong-mamba2-256k --layers 24 --compile off --out scaling.jsonl
         python benchmarks/scaling.py strong-gla-1024k --segment 65536 --steps 2 --out scaling.jsonl
On a CPU, to try it: gloo, tiny models, and no time means anything.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from statex.benchmarking.model import gla_1300m, mamba2_1300m
from statex.benchmarking.training import CPU_TOKENS_PER_STEP, LEARNING_RATE, Case, timed_training
from statex.models.registration import register_families
from statex.recipe import Training
from statex.utils import environment

WARMUP = {"least": 3, "most": 6}  # with "most", blocks keep their activations from the fifth step on
COMPILE: dict[str, Any] = {"auto": "auto", "on": True, "off": False}
FAMILIES = {"gla": (gla_1300m, "paper-gla"), "mamba2": (mamba2_1300m, "paper-mamba2")}


@dataclass(frozen=True)
class Scaling:
    """One case: a model, and tokens that each GPU has ("weak") or that all share ("strong")."""

    family: str
    kind: str
    tokens: int


CASES = {f"weak-{family}": Scaling(family, "weak", 2**16) for family in FAMILIES} | {
    f"strong-{family}-{length // 1024}k": Scaling(family, "strong", length)
    for family in FAMILIES
    for length in (2**17, 2**18, 2**20)
}


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def model_config(make: Callable[[bool], PreTrainedConfig], layers: int | None, small: bool) -> PreTrainedConfig:
    """A configuration with so many layers; expansion takes every sixth of them, so a small one has six."""
    config = make(small)
    config.num_hidden_layers = layers or (6 if small else config.num_hidden_layers)
    return config


def section_of(case: Scaling, options: argparse.Namespace) -> Training:
    """The steps of a case as the training section of a recipe."""
    processes, tokens = world_size(), case.tokens if torch.cuda.is_available() else CPU_TOKENS_PER_STEP
    strong = case.kind == "strong"
    steps = WARMUP[options.activation_memory] + options.steps
    segment = options.segment if torch.cuda.is_available() or options.segment is None else tokens // 4
    return Training(
        steps=steps, warmup_steps=2, tokens_per_step=tokens if strong else processes * tokens, sequence_length=tokens,
        sequences_per_device=1, sequence_parallel=processes if strong else 1, backpropagation_length=segment,
        save_every=steps, log_every=steps, learning_rate=LEARNING_RATE, gradient_checkpointing=True,
        activation_memory=options.activation_memory, compile=COMPILE[options.compile],
        residual_precision=options.residual_precision,
        trainer={"fsdp": True} if options.fsdp else {},
    )  # fmt: skip


def measured(case: Scaling, options: argparse.Namespace) -> dict[str, Any]:
    """A case's record, the peaks of all processes in it."""
    make, preset = FAMILIES[case.family]
    model = Case(partial(model_config, make, options.layers), case.tokens, None if options.unexpanded else preset)
    section = section_of(case, options)
    with tempfile.TemporaryDirectory() as folder:
        trainer, record = timed_training(model, section, Path(folder), warmup=WARMUP[options.activation_memory])
    records: list[Any] = [record]
    if dist.is_initialized():
        records = [None] * dist.get_world_size()
        dist.all_gather_object(records, record)
    peaks = [each["peak_bytes"] for each in records]
    return record | {
        "peak_bytes": max(peaks),
        "peak_bytes_of_ranks": peaks,
        "losses": [statistics.fmean(losses) for losses in zip(*(each["losses"] for each in records), strict=True)],
        "compiled": trainer.blocks.compiled,
        "layers": len(trainer.blocks.blocks),
        "sequence_parallel": section.sequence_parallel,
        "backpropagation_length": section.backpropagation_length,
    }


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row: the record, or that memory did not suffice."""
    device = environment.default_device()
    way = "fsdp" if options.fsdp else "ddp" if world_size() > 1 else "alone"
    row: dict[str, Any] = {
        "case": name, "processes": world_size(), "way": way, "expanded": not options.unexpanded,
        "layers": options.layers, "activation_memory": options.activation_memory,
        "residual_precision": options.residual_precision,
    }  # fmt: skip
    try:
        row |= measured(CASES[name], options)
    except torch.OutOfMemoryError as error:
        row |= {"result": "out of memory", "rank": rank(), "message": str(error).partition(". GPU")[0]}
    return row | {
        "device": environment.device_name(device),
        "commit": environment.source_commit(),
        "versions": environment.versions(),
    }


def line(row: dict[str, Any]) -> str:
    start = f"{row['case']:20} {row['processes']} x {row['way']:5}"
    if "result" in row:
        return f"{start} {row['result']} (rank {row['rank']})"
    share = f", MFU {row['mfu']:.1%}" if row["mfu"] is not None else ""
    peaks = ", ".join(f"{peak / 1e9:.1f}" for peak in row["peak_bytes_of_ranks"])
    return (
        f"{start} {row['step_s']:.3f} s, {row['tokens_per_second'] / 1e3:.1f}K tokens/s{share}, peaks {peaks} GB, "
        f"first step {row['first_step_s']:.1f} s"
    )


def options_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="rows are appended, one JSON a line")
    parser.add_argument("--fsdp", action="store_true", help="weights and optimizer are sharded over the GPUs")
    parser.add_argument("--segment", type=int, metavar="TOKENS", help="backpropagation_length; default: none")
    parser.add_argument("--steps", type=int, default=5, help="that are measured, after the warm-up; default: 5")
    parser.add_argument("--layers", type=int, help="of the model; default: 24 (GLA) or 48 (Mamba2), 6 on a CPU")
    parser.add_argument("--unexpanded", action="store_true", help="the model as it is")
    parser.add_argument("--activation-memory", choices=tuple(WARMUP), default="least")
    parser.add_argument("--residual-precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", choices=tuple(COMPILE), default="auto", help="auto: as `statex train` does")
    return parser.parse_args()


def main() -> None:
    options = options_given()
    register_families()
    for name in options.cases:
        row = run_case(name, options)
        failed = "result" in row
        if rank() == 0 or failed:
            text = json.dumps(row)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(text + "\n")
            print(text, flush=True)
            print(line(row), file=sys.stderr, flush=True)
        if failed and world_size() > 1:
            sys.stdout.flush()
            os._exit(1)  # torchrun ends the others, which wait for this process; so would a tidy exit of this one
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
