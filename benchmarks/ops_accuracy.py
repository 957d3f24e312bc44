"""Errors of the kernels and of their peers against fp64, strength by strength of the decay, over many draws of inputs.

`statex bench ops` checks the same over a few draws. A sum that cancels, as the gradient of ssd's A, wants more: its
error is the luck of a few heads, ours as the peer's. The ratio is the geometric mean over draws, with a 95 % interval.

Example: python benchmarks/ops_accuracy.py --draws 24 --out out ssd-64x64-n512 ssd-64x64-n128
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from ops_with_peers import narrow_choice
from statex.benchmarking.cases import CASES, DECAYS
from statex.benchmarking.ops import errors_of_a_draw, log_ratios
from statex.benchmarking.peers import peer
from statex.benchmarking.runner import run_cases
from statex.results.statistics import student_quantile


def measured(name: str, device: torch.device, draws: int, seed: int) -> list[dict[str, Any]]:
    """A record for each strength of decay and tensor."""
    case = CASES[name]
    found = peer(case.op, case.key_dim)
    records = []
    for decay, strength in DECAYS.items():
        torch.manual_seed(seed)
        pairs = [
            errors_of_a_draw(strength, case, torch.bfloat16, device, found[1] if found else None) for _ in range(draws)
        ]
        for tensor in pairs[0][0]:
            record = {"case": name, "decay": decay, "tensor": tensor, "draws": draws, "seed": seed}
            record["errors"] = [errors[tensor] for errors, _ in pairs]
            if found is not None:
                record |= {"peer": found[0], "peer_errors": [errors[tensor] for _, errors in pairs]}
                logs = log_ratios(record["errors"], record["peer_errors"])
                if all(map(math.isfinite, logs)):
                    mean = statistics.fmean(logs)
                    width = student_quantile(draws - 1) * statistics.stdev(logs) / draws**0.5
                    record["ratio"] = math.exp(mean)
                    record["ratio_interval"] = [math.exp(mean - width), math.exp(mean + width)]
            records.append(record)
    return records


def line(record: dict[str, Any]) -> str:
    text = f"{record['case']:16} {record['decay']:7} {record['tensor']:12} median {median(record['errors'])}"
    if "peer" in record:
        text += f", the peer's {median(record['peer_errors'])}"
    if "ratio" in record:
        low, high = record["ratio_interval"]
        text += f", ratio {record['ratio']:.2f} ({low:.2f} to {high:.2f})"
    return text


def median(errors: list[float]) -> str:
    return f"{statistics.median(errors):.3%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[name for name, case in CASES.items() if not case.is_step])
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for accuracy.json")
    given = parser.parse_args()
    if given.draws < 2:
        parser.error(f"--draws {given.draws}: an interval needs at least 2")
    narrow_choice()  # errors do not depend on how the peers are tuned

    def run_case(name: str, device: torch.device) -> list[dict[str, Any]]:
        return measured(name, device, given.draws, given.seed)

    run_cases(given.cases, CASES, run_case, line, "cuda", given.out / "accuracy.json" if given.out else None)


if __name__ == "__main__":
    main()
