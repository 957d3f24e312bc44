"""`statex bench ops`: each declared case, correctness first, then ours and the peer alternating on the same inputs."""

import contextlib
import functools
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statex.benchmarking.cases import CASES, DECAYS, SWEEPS, Case, exact, make_inputs, ours, plain, rotating_inputs
from statex.benchmarking.peers import peer
from statex.benchmarking.runner import run_cases
from statex.errors import UserError
from statex.utils import timing

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-3}  # relative, of output and each gradient against fp64
SUM_TOLERANCE = 3e-2  # of "d A", one sum a head over all tokens, whose terms cancel (each is in "d dt" as well)
CHECK_TOKENS = 1000  # no multiple of any chunk
DRAWS = 3  # of fresh inputs a check: the error of one draw of a sum that cancels says little
CPU_TOKENS_FACTOR, CPU_FACTOR = 256, 8  # by which a CPU has fewer tokens and smaller dimensions
FLOPS_PER_SECOND = {"H200": 790e12, "H100": 790e12}  # bf16 matrix product on random data, measured
BYTES_PER_SECOND = {"H200": 4265e9, "H100": 3000e9}  # device copy, read and written, measured


def run_ops_benchmark(
    cases: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    sweep: str | None = None,
    device: torch.device | str | None = None,
    repetitions: int = 20,
    peers: bool | None = None,
) -> list[dict]:
    """Check and time the recurrences; print a table to stderr.

    Args:
        cases: names out of `CASES`, or of the sweep's cases; default: all.
        out: folder for ops.json, of a sweep for ops-<sweep>.json.
        sweep: a name in `SWEEPS`: cost against the size of the state, or against the number of tokens.
        device: default: CUDA where there is one. On a CPU the cases are reduced, run the chunked PyTorch version
            against the one-token definition, and report ratios only.
        peers: whether to measure other libraries' kernels too, where they are installed. They tune themselves at each
            new shape, which takes minutes: by default they are measured in the cases, not in a sweep.

    Returns:
        one record a case and pass ("fwd", "fwd+bwd", "step"): errors of both, and, only where ours is right, times
        in ms (null on a CPU), ratio, share of the floor, peak memory in bytes and seconds of the first call. Steps
        are timed as replays of a graph over states that no cache holds, beside torch's product of the same states in
        place ("in_place_ms"), and also as they are launched ("eager_ms").

    Raises:
        UserError: an unknown case or sweep.
    """
    if sweep is not None and sweep not in SWEEPS:
        raise UserError("sweep", sweep, "is unknown", f"use one of {', '.join(SWEEPS)}")
    known = CASES if sweep is None else SWEEPS[sweep]
    with_peers = sweep is None if peers is None else peers

    def run_case(name: str, device: torch.device) -> list[dict]:
        return [record | {"sweep": sweep} for record in _run_case(known[name], device, repetitions, with_peers)]

    return run_cases(cases, known, run_case, _line, device, out / records_file(sweep) if out is not None else None)


def records_file(sweep: str | None) -> str:
    """Where the records of the cases, or of a sweep, stand in the folder that is given."""
    return "ops.json" if sweep is None else f"ops-{sweep}.json"


def _run_case(case: Case, device: torch.device, repetitions: int, peers: bool) -> list[dict]:
    on_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if on_cuda else torch.float32
    if not on_cuda:
        case = case.reduced(case.tokens // CPU_TOKENS_FACTOR, CPU_FACTOR)
    found = peer(case.op, case.key_dim) if on_cuda and peers else None
    if found is None and not on_cuda and not case.is_step:
        found = ("naive", plain(case))
    first_call = _first_call(ours(case), case, dtype, device)
    if found is not None and on_cuda:
        _first_call(found[1], case, dtype, device)  # so that it tunes itself at the shape that is timed
    errors, peer_errors, ratios = check_case(case, dtype, device, found[1] if found else None)
    passed = all(
        error < (SUM_TOLERANCE if name == "d A" else TOLERANCE[dtype]) for name, error in errors.items()
    )  # NaN does not pass
    records = []
    for backward in (False,) if case.is_step else (False, True):
        record: dict[str, Any] = {
            "case": case.name,
            "op": case.op,
            "pass": "step" if case.is_step else "fwd+bwd" if backward else "fwd",
        }
        record |= {"tokens": case.tokens, "state_size": case.state_size, "dtype": str(dtype).removeprefix("torch.")}
        record |= {"correct": passed, "errors": errors, "peer": found[0] if found else None}
        record |= {"peer_errors": peer_errors, "error_ratios": ratios, "first_call_s": first_call if on_cuda else None}
        if passed:
            record |= _times(case, dtype, device, found[1] if found else None, backward, repetitions)
        records.append(record)
    return records


def check_case(
    case: Case, dtype: torch.dtype, device: torch.device, other: Callable[..., Any] | None
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Relative errors of ours and of the peer, root mean square over `DRAWS` fresh inputs, largest over all strengths
    of decay; and for each tensor the ratio of the two, geometric mean over the draws, largest at one strength."""
    worst: dict[str, float] = {}
    peer_worst: dict[str, float] = {}
    ratios: dict[str, float] = {}
    for strength in DECAYS.values():
        draws = [errors_of_a_draw(strength, case, dtype, device, other) for _ in range(DRAWS)]
        for name in draws[0][0]:
            errors = [of_ours[name] for of_ours, _ in draws]
            _keep_largest(worst, name, _root_mean_square(errors))
            if other is None:
                continue
            peer_errors = [of_peer[name] for _, of_peer in draws]
            _keep_largest(peer_worst, name, _root_mean_square(peer_errors))
            if all(peer_errors):
                _keep_largest(ratios, name, math.exp(statistics.fmean(log_ratios(errors, peer_errors))))
    return worst, peer_worst, ratios


def errors_of_a_draw(
    strength: float, case: Case, dtype: torch.dtype, device: torch.device, other: Callable[..., Any] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of output and gradients, ours and the peer's, against fp64 on the same fresh inputs of at most
    `CHECK_TOKENS` tokens."""
    small = case if case.is_step else case.reduced(min(case.tokens, CHECK_TOKENS))
    inputs = make_inputs(small, dtype, device, strength)
    truth = _everything(exact(small), {name: x.double() for name, x in inputs.items()}, small)
    errors = _errors(_everything(ours(small), inputs, small), truth)
    return errors, {} if other is None else _errors(_everything(other, inputs, small), truth)


def log_ratios(errors: Sequence[float], peer_errors: Sequence[float]) -> list[float]:
    """Of each draw's error to the peer's; infinite or NaN where one of them is."""
    return [
        math.log(max(mine, 1e-300)) - math.log(max(theirs, 1e-300))
        for mine, theirs in zip(errors, peer_errors, strict=True)
    ]


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _keep_largest(kept: dict[str, float], name: str, value: float) -> None:
    kept[name] = value if math.isnan(value) else max(kept.get(name, 0.0), value)


def _everything(function: Callable[..., Any], inputs: dict[str, Tensor], case: Case) -> dict[str, Tensor]:
    """Output and every gradient for a fixed random gradient of the output; for a step, output and state."""
    inputs = {name: x.clone() for name, x in inputs.items()}
    if case.is_step:
        output = function(**inputs)
        output, state = output if isinstance(output, tuple) else (output, inputs["state"])
        return {"output": output, "state": state}
    for x in inputs.values():
        x.requires_grad_()
    output, _ = function(**inputs)
    generator = torch.Generator(output.device).manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    output.backward(gradient.to(torch.bfloat16).to(output.dtype))
    return {"output": output.detach()} | {f"d {name}": x.grad for name, x in inputs.items()}


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name].double() - x).norm() / x.norm().clamp_min(1e-300)).item() for name, x in truth.items()}


def _first_call(function: Callable[..., Any], case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of the first call at this shape with everything it compiles, backward included."""
    inputs = make_inputs(case, dtype, device)
    watch = timing.Stopwatch(device)
    _runner(function, inputs, case, not case.is_step)()
    return watch.seconds()


def _runner(function: Callable[..., Any], inputs: dict[str, Tensor], case: Case, backward: bool) -> Callable:
    if case.is_step:
        return lambda: function(**inputs)
    inputs = {name: x.detach().requires_grad_(backward) for name, x in inputs.items()}
    gradient = torch.randn_like(inputs["v" if "v" in inputs else "x"])

    def run() -> None:
        output, _ = function(**inputs)
        if backward:
            output.backward(gradient)
            for x in inputs.values():
                x.grad = None

    return run


def _times(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    other: Callable[..., Any] | None,
    backward: bool,
    repetitions: int,
) -> dict:
    inputs = make_inputs(case, dtype, device)
    runners = [_runner(function, inputs, case, backward) for function in (ours(case), other) if function is not None]
    seconds = timing.time_functions(runners, device, repetitions)
    record: dict = {"ratio": seconds[1] / seconds[0] if other is not None else None, "repetitions": repetitions}
    if device.type != "cuda":
        return record
    peaks = []
    for run in runners:
        gc.collect()  # what a peer's tuning left behind would be freed in the middle of the measurement
        before = torch.cuda.memory_allocated(device)
        timing.reset_peak_memory(device)
        run()
        peaks.append(timing.peak_memory(device) - before)
    floor = _floor(case, backward, torch.cuda.get_device_name(device))
    record |= {"peak_bytes": peaks[0], "peer_peak_bytes": peaks[1] if other is not None else None}
    if case.is_step:
        record |= {"eager_ms": 1e3 * seconds[0], "peer_eager_ms": 1e3 * seconds[1] if other is not None else None}
        replayed = _replayed(case, dtype, device, other)
        captured = len(replayed) > 2
        seconds = [replayed[0], replayed[2] if captured else seconds[-1]]
        record |= {"ratio": seconds[1] / seconds[0] if captured else record["ratio"], "peer_captured": captured}
        record |= {"in_place_ms": 1e3 * replayed[1]}
    record |= {"ms": 1e3 * seconds[0], "peer_ms": 1e3 * seconds[1] if other is not None else None}
    return record | {"floor_ms": floor and 1e3 * floor, "floor_share": floor and floor / seconds[0]}


def _replayed(case: Case, dtype: torch.dtype, device: torch.device, other: Callable[..., Any] | None) -> list[float]:
    """Seconds of graph replays, alternating: of ours, of torch multiplying the state in place, and of the peer where
    there is one that can be captured."""
    inputs = rotating_inputs(case, dtype, device)

    def runs(function: Callable[..., Any]) -> list[Callable[[], Any]]:
        return [functools.partial(function, **each) for each in inputs]

    functions = [runs(ours(case)), runs(lambda state, **_: state.mul_(1.0))]
    if other is not None:
        with contextlib.suppress(RuntimeError):
            return timing.time_replays([*functions, runs(other)])
    return timing.time_replays(functions)


def _floor(case: Case, backward: bool, device_name: str) -> float | None:
    """Seconds that the arithmetic of the state or the least memory traffic takes; None on a device not measured."""
    for name, rate in FLOPS_PER_SECOND.items():
        if name in device_name:
            arithmetic = 0.0 if case.is_step else case.flops(backward) / rate
            return max(arithmetic, case.moved_bytes(backward) / BYTES_PER_SECOND[name])
    return None


def _line(record: dict) -> str:
    """One row of the table; a case that fails shows its errors and no time."""
    head = f"{record['case']:20} {record['pass']:8}"
    if not record["correct"]:
        return f"{head} WRONG " + " ".join(f"{name} {error:.1e}" for name, error in record["errors"].items())

    def show(key: str, form: str, scale: float = 1.0) -> str:
        value = record.get(key)
        return "-".rjust(len(format(0, form))) if value is None else format(value * scale, form)

    worst = max(record["errors"].values())
    return (
        f"{head} ours {show('ms', '8.4f')} ms, peer {show('peer_ms', '8.4f')} ms, ratio {show('ratio', '5.2f')}, "
        f"floor {show('floor_share', '5.0%')}, peak {show('peak_bytes', '6.2f', 1e-9)} GB "
        f"(peer {show('peer_peak_bytes', '6.2f', 1e-9)}), first call {show('first_call_s', '5.1f')} s, "
        f"error {worst:.1e}" + _eager(record) + _ratios(record["error_ratios"])
    )


def _eager(record: dict) -> str:
    """What torch takes to read and write a step's state, what launching adds, and whether the peer's time has it."""
    if record.get("eager_ms") is None:
        return ""
    text = f", torch's state.mul_ {record['in_place_ms']:.4f} ms, launched {record['eager_ms']:.3f} ms"
    if record["peer_eager_ms"] is not None:
        text += f", peer {record['peer_eager_ms']:.3f} ms"
        text += "" if record["peer_captured"] else " (it cannot be captured: its time and the ratio are of launches)"
    return text


def _ratios(ratios: dict[str, float]) -> str:
    """Each tensor's error over the peer's."""
    if not ratios:
        return ""
    return " (over the peer's: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()) + ")"
