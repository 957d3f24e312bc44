"""A case of `statex bench ops` forward and backward, twice, and nothing else: for a profiler of kernels.

Example, which reads the second pass of ssd at N 512, ten kernels:
  ncu --clock-control none --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \\
      --section Occupancy --kernel-name 'regex:(scores|scale|walk|output|score_gradient|key_gradient)_kernel' \\
      --launch-skip 10 --launch-count 10 python benchmarks/one_pass.py ssd-64x64-n512
"""

import argparse

import torch

from statex.benchmarking.cases import CASES, make_inputs, ours
from statex.benchmarking.ops import _runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=[name for name, case in CASES.items() if not case.is_step])
    case = CASES[parser.parse_args().case]
    torch.manual_seed(0)
    run = _runner(ours(case), make_inputs(case, torch.bfloat16, "cuda"), case, backward=True)
    for _ in range(2):
        run()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
