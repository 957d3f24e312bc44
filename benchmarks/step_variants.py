"""Variants of the one-token step kernels: tile, split of the key dim, warps, cache policies; each correct before timed.

Each variant is timed as replays of a CUDA graph of many steps that rotate among states, so that neither launching nor
the L2 cache is measured. Torch's in-place product of the state with a number shows what reading and writing it costs.

Example: python benchmarks/step_variants.py --out out --seconds 240
"""

import argparse
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from statex import ops
from statex.benchmarking.cases import Case, make_inputs, rotating_inputs
from statex.benchmarking.ops import BYTES_PER_SECOND
from statex.ops.gla import step_gla
from statex.ops.ssd import step_ssd
from statex.utils import timing

SHAPES = {  # name: case; ssd's key_dim is N, its value_dim P
    case.name: case
    for case in (
        Case("gla-1x1024x2048-b32", "gla_step", 1, 1024, 2048, tokens=1, batch=32),
        Case("gla-1x1024x2048-b1", "gla_step", 1, 1024, 2048, tokens=1),
        Case("gla-4x256x512-b32", "gla_step", 4, 256, 512, tokens=1, batch=32),
        Case("gla-4x256x512-b1", "gla_step", 4, 256, 512, tokens=1),
        Case("ssd-64x64-n512-b32", "ssd_step", 64, 512, 64, tokens=1, batch=32),
        Case("ssd-64x64-n512-b1", "ssd_step", 64, 512, 64, tokens=1),
        Case("ssd-64x64-n128-b32", "ssd_step", 64, 128, 64, tokens=1, batch=32),
    )
}


@triton.jit(do_not_specialize=["rows"])
def gla_kernel(
    q, k, v, log_decay, state, out, scale, rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
    OUTPUT: tl.constexpr, STREAM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BV value channels of TILES * BK key channels of one head; divisible shapes only."""
    cols_v = tl.program_id(0) * BV + tl.arange(0, BV)
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    values = tl.load(v + row * V + cols_v).to(tl.float32)
    at = row * K + split * TILES * BK + tl.arange(0, BK)
    here = state + at[:, None] * V + cols_v[None, :]
    result = tl.zeros((BK, BV), tl.float32)
    if TILES == 1:
        result = gla_tile(q, k, log_decay, load_state(here, True, STREAM), values, here, at, STREAM)
    elif AHEAD:  # the next tile is on its way while this one is used
        tile = load_state(here, True, STREAM)
        for i in range(TILES):
            following = load_state(here + BK * V, i + 1 < TILES, STREAM)
            result += gla_tile(q, k, log_decay, tile, values, here, at, STREAM)
            tile = following
            here += BK * V
            at += BK
    else:
        for _ in range(TILES):
            result += gla_tile(q, k, log_decay, load_state(here, True, STREAM), values, here, at, STREAM)
            here += BK * V
            at += BK
    output = tl.sum(result, 0) * scale
    if OUTPUT == "whole":
        tl.store(out + row * V + cols_v, output.to(out.dtype.element_ty))
    elif OUTPUT == "atomic":
        tl.atomic_add(out + row * V + cols_v, output, sem="relaxed")
    else:
        tl.store(out + (split * rows + row) * V + cols_v, output)


@triton.jit
def load_state(here, inside, STREAM: tl.constexpr):
    if STREAM:
        tile = tl.load(here, mask=inside, other=0.0, eviction_policy="evict_first")
    else:
        tile = tl.load(here, mask=inside, other=0.0)
    return tile


@triton.jit
def store_state(here, tile, STREAM: tl.constexpr):
    if STREAM:
        tl.store(here, tile, cache_modifier=".cs")
    else:
        tl.store(here, tile)


@triton.jit
def gla_tile(q, k, log_decay, tile, values, here, at, STREAM: tl.constexpr):
    queries = tl.load(q + at).to(tl.float32)
    keys = tl.load(k + at).to(tl.float32)
    decay = tl.exp(tl.load(log_decay + at).to(tl.float32))
    tile = tile * decay[:, None] + keys[:, None] * values[None, :]
    store_state(here, tile, STREAM)
    return tile * queries[:, None]


@triton.jit
def sum_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the partial outputs of all splits, in the output's dtype."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def ssd_kernel(
    x, dt, A, B, C, D, state, out,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    STREAM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """BP channels of one head, the whole state size; divisible shapes only."""
    cols_p = tl.program_id(0) * BP + tl.arange(0, BP)
    row = tl.program_id(1).to(tl.int64)
    head, batch = row % H, row // H
    step = tl.load(dt + row).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    values = tl.load(x + row * P + cols_p).to(tl.float32)
    at = (batch * G + head // (H // G)) * N + tl.arange(0, BN)
    here = state + (row * P + cols_p)[:, None] * N + tl.arange(0, BN)[None, :]
    result = tl.zeros((BP, BN), tl.float32)
    if AHEAD:
        tile = load_state(here, True, STREAM)
        for n0 in range(0, N, BN):
            following = load_state(here + BN, n0 + BN < N, STREAM)
            result += ssd_tile(B, C, tile, step * values, decay, here, at, STREAM)
            tile = following
            here += BN
            at += BN
    else:
        for _ in range(0, N, BN):
            result += ssd_tile(B, C, load_state(here, True, STREAM), step * values, decay, here, at, STREAM)
            here += BN
            at += BN
    output = tl.sum(result, 1) + tl.load(D + head).to(tl.float32) * values
    tl.store(out + row * P + cols_p, output.to(out.dtype.element_ty))


@triton.jit
def ssd_tile(B, C, tile, written, decay, here, at, STREAM: tl.constexpr):
    writes = tl.load(B + at).to(tl.float32)
    reads = tl.load(C + at).to(tl.float32)
    tile = tile * decay + written[:, None] * writes[None, :]
    store_state(here, tile, STREAM)
    return tile * reads[None, :]


@dataclass(frozen=True)
class Variant:
    """One choice. For gla a program has `tiles` tiles of [rows, columns] = [keys, values], and where that is not the
    whole key dim `output` says how the partial outputs meet: "atomic" or "parts". For ssd a tile is [channels, state]
    and a program always has the whole state size."""

    rows: int
    columns: int
    tiles: int
    warps: int
    stream: bool = False
    ahead: bool = False
    output: str = "whole"

    def __str__(self) -> str:
        flags = ("stream " if self.stream else "") + ("ahead " if self.ahead else "") + self.output
        return f"[{self.rows},{self.columns}] x {self.tiles}, {self.warps} warps {flags}"


def variants(case: Case) -> Iterator[Variant]:
    K, V = case.key_dim, case.value_dim
    if case.op == "ssd_step":
        for columns in sorted({min(K, 128), min(K, 256), K}):
            for size in (1024, 2048, 4096, 8192):
                for warps in (2, 4, 8):
                    if 1 <= size // columns <= V and 8 <= size // (32 * warps) <= 64:
                        for ahead in {False, columns < K}:
                            for stream in (False, True):
                                yield Variant(size // columns, columns, K // columns, warps, stream, ahead)
        return
    for columns in (64, 128, 256):
        for size in (2048, 4096, 8192):
            rows = size // columns
            for warps in (4, 8):
                if rows > K or not 8 <= size // (32 * warps) <= 64:
                    continue
                for tiles in sorted({1, 4, K // rows}):
                    whole = tiles * rows == K
                    if tiles * rows > K or (tiles > 4 and warps == 8):
                        continue
                    for output in ("whole",) if whole else ("atomic", "parts"):
                        if output == "atomic" and (size != 4096 or tiles > 1):
                            continue
                        for ahead in {False, tiles > 1 and size < 8192}:
                            for stream in (False, True):
                                yield Variant(rows, columns, tiles, warps, stream, ahead, output)


def gla_runner(case: Case, variant: Variant) -> Callable[..., torch.Tensor]:
    K, V = case.key_dim, case.value_dim
    splits = K // (variant.rows * variant.tiles)

    def run(q, k, v, log_decay, state):
        rows = state.shape[0] * state.shape[1]
        if variant.output == "whole":
            out = torch.empty_like(v)
        elif variant.output == "atomic":
            out = torch.zeros(v.shape, device=v.device)
        else:
            out = torch.empty(splits, *v.shape, device=v.device)
        gla_kernel[(V // variant.columns, splits, rows)](
            q, k, v, log_decay, state, out, K**-0.5, rows, K=K, V=V, BK=variant.rows, BV=variant.columns,
            TILES=variant.tiles, OUTPUT=variant.output, STREAM=variant.stream, AHEAD=variant.ahead,
            num_warps=variant.warps,
        )  # fmt: skip
        if variant.output == "whole":
            return out
        if variant.output == "atomic":
            return out.to(v.dtype)
        total = torch.empty_like(v)
        sum_kernel[(triton.cdiv(v.numel(), 512),)](out, total, v.numel(), SPLITS=splits, BLOCK=512, num_warps=4)
        return total

    return run


def ssd_runner(case: Case, variant: Variant) -> Callable[..., torch.Tensor]:
    H, N, P = case.heads, case.key_dim, case.value_dim

    def run(x, dt, A, B, C, D, state):
        out = torch.empty_like(x)
        ssd_kernel[(P // variant.rows, state.shape[0] * H)](
            x, dt, A, B, C, D, state, out, H=H, G=B.shape[1], P=P, N=N, BP=variant.rows, BN=variant.columns,
            STREAM=variant.stream, AHEAD=variant.ahead, num_warps=variant.warps,
        )  # fmt: skip
        return out

    return run


def runner(case: Case, variant: Variant) -> Callable[..., torch.Tensor]:
    return (ssd_runner if case.op == "ssd_step" else gla_runner)(case, variant)


@functools.cache
def exact_steps(case: Case, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Inputs, and output and state after two steps with them in fp64."""
    torch.manual_seed(0)
    inputs = make_inputs(case, torch.bfloat16, device, 1.0)
    exact = {name: x.double() for name, x in inputs.items()}
    reference = step_ssd if case.op == "ssd_step" else step_gla
    for _ in range(2):
        output = reference(**exact)
    return inputs, output, exact["state"]


def error_of(run: Callable[..., torch.Tensor], case: Case, device: str) -> float:
    """The larger relative error of output and state, after two steps of two rows, against fp64 on the same inputs."""
    inputs, output, state = exact_steps(replace(case, batch=min(case.batch, 2)), device)
    inputs = inputs | {"state": inputs["state"].clone()}
    for _ in range(2):
        found = run(**inputs)
    pairs = ((found, output), (inputs["state"], state))
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs)


def host_microseconds(run: Callable[[], object], calls: int = 300) -> float:
    """Of one call, without waiting for the device."""
    for _ in range(20):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * taken / calls


def measure_shape(case: Case, deadline: float) -> list[dict[str, Any]]:
    floor = 8 * case.state_size * case.batch / BYTES_PER_SECOND["H200"]
    inputs = rotating_inputs(case, torch.bfloat16, "cuda")
    rows: list[dict[str, Any]] = []

    def record(name: str, run: Callable[..., Any], error: float | None, **more: Any) -> None:
        [taken] = timing.time_replays([[functools.partial(run, **each) for each in inputs]])
        rows.append({"shape": case.name, "variant": name, "us": 1e6 * taken, "floor_share": floor / taken})
        rows[-1] |= {"error": error} | more

    record("torch: state.mul_(1.0)", lambda **each: each["state"].mul_(1.0), None)
    shipped = getattr(ops, case.op)
    host = host_microseconds(lambda: shipped(**inputs[0]))
    record("shipped", shipped, error_of(shipped, case, "cuda"), host_us=host)
    for variant in variants(case):
        if time.perf_counter() > deadline:
            print(f"{case.name}: out of time", flush=True)
            break
        try:
            run = runner(case, variant)
            error = error_of(run, case, "cuda")
            if not error < 5e-3:
                rows.append({"shape": case.name, "variant": str(variant), "us": None, "error": error})
                continue
            record(str(variant), run, error, **asdict(variant))
        except Exception as problem:  # the others are still worth their time
            rows.append({"shape": case.name, "variant": str(variant), "us": None, "error": str(problem)[:200]})
    return rows


def compile_some(share: tuple[int, int, list[str]]) -> None:
    """Compile every `step`-th variant of the shapes from `first` on into Triton's cache on disk."""
    first, step, names = share
    seen = []
    for name in names:
        case = SHAPES[name]
        one = Case(case.name, case.op, case.heads, case.key_dim, case.value_dim, tokens=1)
        for variant in variants(one):
            if (key := (one.op, one.heads, one.key_dim, variant)) not in seen:
                seen.append(key)
                if len(seen) % step == first:
                    try:
                        runner(one, variant)(**make_inputs(one, torch.bfloat16, "cuda"))
                    except Exception as problem:
                        print(f"{name} {variant}: {problem}"[:200], flush=True)
    torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], best: int) -> str:
    lines = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == name]
        failed = [row for row in here if row["us"] is None]
        fixed = [row for row in here if row["us"] is not None and "rows" not in row]
        timed = sorted((row for row in here if row["us"] is not None and "rows" in row), key=lambda row: row["us"])
        lines.append(f"{name} ({len(timed)} variants, {len(failed)} failed)")
        for row in [*fixed, *timed[:best]]:
            error = f"{row['error']:.1e}" if row["error"] is not None else "-"
            host = f", host {row['host_us']:.0f} us" if "host_us" in row else ""
            lines.append(f"  {row['us']:8.2f} us  {row['floor_share']:4.0%}  error {error}  {row['variant']}{host}")
        lines += [f"  failed: {row['variant']}: {row['error']}" for row in failed[:3]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=float, default=240, help="stop trying variants after this time")
    parser.add_argument("--processes", type=int, default=12, help="that compile side by side; 0: none")
    parser.add_argument("--best", type=int, default=10, help="variants of a shape to print")
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    begun = time.perf_counter()
    names = arguments.shapes or list(SHAPES)
    if arguments.processes:
        context = multiprocessing.get_context("spawn")
        count = arguments.processes
        workers = [context.Process(target=compile_some, args=((i, count, names),)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        left = begun + arguments.seconds - time.perf_counter()
        rows += measure_shape(SHAPES[name], time.perf_counter() + left / (len(names) - i))
        torch.cuda.empty_cache()
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "step_variants.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows, arguments.best))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
