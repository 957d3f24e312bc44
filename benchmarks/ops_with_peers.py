"""`statex bench ops` on a fresh machine, with the peers tuned in minutes instead of hours.

The peers try hundreds of kernel variants at each new shape, one after the other. Here many processes first compile
them side by side into Triton's cache; then the benchmark runs as usual. --quick narrows the peers' choice to 4 or 8
warps and 2 or 3 stages and times each variant for 20 ms: say so beside figures made with it.

Examples:
  python benchmarks/ops_with_peers.py --processes 14 --quick --out out gla-1x1024x2048 ssd-64x64-n512
  python benchmarks/ops_with_peers.py --processes 14 --quick --out out --sweep tokens
"""

import argparse
import functools
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.runtime.autotuner import Autotuner

from statex.benchmarking.cases import CASES, SWEEPS, Case, make_inputs
from statex.benchmarking.ops import _runner, records_file, run_ops_benchmark
from statex.benchmarking.peers import peer

COMPILE_TOKENS = 4096
MANY_VARIANTS = 12
SHARED_MEMORY = 227 * 1024  # bytes a program may have on Hopper


def narrow_choice() -> None:
    """Let a tuner of many variants see only those of 4 or 8 warps and 2 or 3 stages."""
    original = Autotuner.__init__

    @functools.wraps(original)
    def init(self, fn, arg_names, configs, *args, **kwargs):
        few = [config for config in configs or () if config.num_warps in (4, 8) and config.num_stages in (2, 3)]
        original(self, fn, arg_names, few if few and len(configs) > MANY_VARIANTS else configs, *args, **kwargs)

    Autotuner.__init__ = init
    Autotuner.do_bench = property(lambda self: functools.partial(triton.testing.do_bench, warmup=5, rep=20))


def compile_variants(cases: list[Case], seed: int, quick: bool) -> None:
    """Run the peers once, compiling every variant of their kernels, in an order of this process's own."""
    if quick:
        narrow_choice()
    shuffle = random.Random(seed)

    def compile_only(self, *args, config, **meta):
        try:
            kernel = self.fn.warmup(*args, grid=(1,), **(meta | config.all_kwargs()))
        except Exception:  # a variant that does not compile is the tuner's to skip
            return [float("inf")] * 3
        return [shuffle.random() if kernel.metadata.shared <= SHARED_MEMORY else float("inf")] * 3

    def in_random_order(self, kwargs):
        configs = list(prune(self, kwargs))
        shuffle.shuffle(configs)
        return configs

    prune = Autotuner.prune_configs
    Autotuner._bench, Autotuner.prune_configs = compile_only, in_random_order
    Autotuner.check_disk_cache = lambda self, key, configs, bench: bench()
    for case in shuffle.sample(cases, len(cases)):
        found = peer(case.op, case.key_dim)
        if found is not None:
            try:
                _runner(found[1], make_inputs(case, torch.bfloat16, "cuda"), case, not case.is_step)()
                torch.cuda.synchronize()
            except Exception as error:  # an untuned variant may not run; it is compiled all the same
                print(f"{case.name}: {error}"[:200], flush=True)


def to_compile(cases: list[Case]) -> list[Case]:
    """One case of few tokens for each shape: the peers compile for shapes, not for tokens."""
    by_shape = {replace(case, name="", tokens=min(case.tokens, COMPILE_TOKENS)): case.name for case in cases}
    return [replace(case, name=name) for case, name in by_shape.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="default: all, or all of the sweep")
    parser.add_argument("--sweep", choices=list(SWEEPS))
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help="stop once the peers are in Triton's cache")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    known = CASES if arguments.sweep is None else SWEEPS[arguments.sweep]
    names = arguments.cases or list(known)
    cases = to_compile([known[name] for name in names])
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=compile_variants, args=(cases, seed, arguments.quick))
        for seed in range(arguments.processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"peers compiled in {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.compile_only:
        return
    if arguments.quick:
        narrow_choice()
    run_ops_benchmark(cases=names, out=arguments.out, sweep=arguments.sweep, peers=True)
    if arguments.sweep is not None and arguments.out is not None:
        from statex.reporting.sweep import write_sweep  # only here: the machine that measures may have no matplotlib

        print(write_sweep(arguments.out / records_file(arguments.sweep)))


if __name__ == "__main__":
    main()
