"""Errors of the kernels and of their peers against fp64, strength by strength of the decay, over many draws.

`statex bench ops` checks the same over a few draws; a sum that cancels, as the gradient of ssd's A, wants more.

Example: python benchmarks/ops_accuracy.py --draws 24 ssd-64x64-n512 ssd-64x64-n128
"""

import argparse

import torch

from ops_with_peers import narrow_choice
from statex.benchmarking.cases import CASES, DECAYS
from statex.benchmarking.ops import errors_at
from statex.benchmarking.peers import peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[name for name, case in CASES.items() if not case.is_step])
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    narrow_choice()  # errors do not depend on how the peers are tuned
    print(f"error in % of the norm, ours / the peer's = ratio; bf16, {arguments.draws} draws, seed {arguments.seed}")
    for name in arguments.cases:
        case = CASES[name]
        found = peer(case.op)
        for decay, strength in DECAYS.items():
            torch.manual_seed(arguments.seed)
            other = found[1] if found is not None else None
            errors, peers = errors_at(strength, case, torch.bfloat16, torch.device("cuda"), other, arguments.draws)
            texts = [f"{key} {100 * value:.3f}" for key, value in errors.items()]
            if peers:
                texts = [
                    f"{text} / {100 * peers[key]:.3f} = {errors[key] / max(peers[key], 1e-30):.2f}"
                    for text, key in zip(texts, errors, strict=True)
                ]
            print(f"{name} {decay}: " + ", ".join(texts), flush=True)


if __name__ == "__main__":
    main()
