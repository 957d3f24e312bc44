"""One training pass (forward and backward) through a stack of blocks of 1.3B shape: as it is, and each block compiled.

Correctness first: the compiled blocks' output and gradients must be as near to fp32 on PyTorch's path as those of the
blocks as they are. Then both alternate. Weights fp32, bf16 autocast, an fp32 residual stream, as `statex train` has it.

Two ways are compiled: the layer ops (short convolution, gated norm) as our kernels, and as PyTorch's code that the
compiler fuses. It needs torch, transformers, and triton on a GPU; `--small` is a smoke test on a CPU.

Example: python benchmarks/compiled_blocks.py --out out
         python benchmarks/compiled_blocks.py --out out gla-expanded --documents 40 --layers 8
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import statex
from statex.models.configuration_mamba2 import StatexMamba2Config
from statex.models.gla.configuration import GLAConfig
from statex.models.gla.modeling import GLAForCausalLM
from statex.models.mamba2 import StatexMamba2ForCausalLM
from statex.ops import backends, use_backend
from statex.utils import environment, timing

CASES = ("gla", "gla-expanded", "mamba2", "mamba2-expanded")
LAYER_OPS = {"kernels": backends.FUSED_WITHOUT_GRADIENTS, "compiler": set()}  # of those, not fused with gradients
CHECKED_TOKENS = 2048
SLACK, FLOOR = 1.5, 2e-3  # errors may be so many times those of the blocks as they are, and this more


@dataclass(frozen=True)
class Sizes:
    layers: int
    tokens: int
    documents: int
    checkpointing: bool
    small: bool


def make_blocks(case: str, sizes: Sizes, device: torch.device) -> nn.ModuleList:
    """Blocks of the model's shape; "expanded": the first two with the paper's larger state."""
    family, _, expanded = case.partition("-")
    torch.manual_seed(0)
    with device:
        if family == "gla":
            width = {"hidden_size": 128, "num_heads": 2} if sizes.small else {"hidden_size": 2048, "num_heads": 4}
            model: Any = GLAForCausalLM(GLAConfig(num_hidden_layers=sizes.layers, vocab_size=256, **width))
        else:
            width = {"hidden_size": 2048, "num_heads": 64, "head_dim": 64, "state_size": 128}
            if sizes.small:
                width = {"hidden_size": 128, "num_heads": 8, "head_dim": 32, "state_size": 16}
            settings: dict[str, Any] = {"num_hidden_layers": sizes.layers, "vocab_size": 256, "n_groups": 1}
            model = StatexMamba2ForCausalLM(StatexMamba2Config(**settings, **width))
    if expanded:
        statex.expand(model, layers=[0, 1], init="reinit")
    model.train()
    if sizes.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.base_model.layers


class Pass:
    """Forward and backward of the stack over fixed inputs: `run()`; `results()` has the output and every gradient."""

    def __init__(self, blocks: nn.ModuleList, tokens: int, documents: int, device: torch.device):
        width = next(iter(blocks[0].parameters())).shape[-1]
        generator = torch.Generator(device).manual_seed(1)
        self.blocks, self.device = blocks, device
        self.inputs, self.gradient = torch.randn(2, 1, tokens, width, generator=generator, device=device).unbind()
        self.inputs.requires_grad_()
        self.options: dict[str, Tensor] = {}
        if documents:
            starts = torch.linspace(0, tokens, documents + 1).long() // 3 * 3  # of no round lengths
            starts[-1] = tokens
            seq_idx = torch.searchsorted(starts[1:], torch.arange(tokens), right=True, out_int32=True)
            self.options = {"seq_idx": seq_idx[None].to(device), "cu_seqlens": starts.int()}

    def forward(self, autocast: bool = True) -> Tensor:
        hidden = self.inputs
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            for block in self.blocks:
                hidden = block(hidden, **self.options)
        return hidden

    def run(self, autocast: bool = True) -> Tensor:
        self.inputs.grad = None
        self.blocks.zero_grad()
        output = self.forward(autocast)
        output.backward(self.gradient.to(output.dtype))
        return output.detach()

    def results(self, autocast: bool = True) -> dict[str, Tensor]:
        output = self.run(autocast)
        assert self.inputs.grad is not None
        gradients = {name: p.grad.clone() for name, p in self.blocks.named_parameters() if p.grad is not None}
        return {"output": output, "inputs": self.inputs.grad.clone()} | gradients


@contextmanager
def compiled(blocks: nn.ModuleList) -> Iterator[None]:
    """Inside this context, each block runs as one compiled graph; blocks of one shape share it."""
    for block in blocks:
        block.compile(fullgraph=True)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def swapped(blocks: nn.ModuleList) -> tuple[Callable[[], None], Callable[[], None]]:
    """Calls that put the blocks as they are, and the compiled ones, in place."""
    implementations = [block._compiled_call_impl for block in blocks]

    def put(compiled: bool) -> None:
        for block, implementation in zip(blocks, implementations, strict=True):
            block._compiled_call_impl = implementation if compiled else None

    return lambda: put(False), lambda: put(True)


def distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def check(blocks: nn.ModuleList, sizes: Sizes, device: torch.device) -> dict[str, float]:
    """The worst errors against fp32 on PyTorch's path.

    Raises:
        ArithmeticError: a compiled result is worse than that of the blocks as they are.
    """
    one = Pass(blocks, min(CHECKED_TOKENS, sizes.tokens), min(sizes.documents, 7), device)
    with use_backend("torch"):
        wanted = one.results(autocast=False)
    plain = {name: distance(x, wanted[name]) for name, x in one.results().items()}
    with compiled(blocks):
        found = {name: distance(x, wanted[name]) for name, x in one.results().items()}
    torch._dynamo.reset()
    wrong = {name: (found[name], plain[name]) for name in wanted if not found[name] <= SLACK * plain[name] + FLOOR}
    if wrong or set(plain) != set(wanted) or set(found) != set(wanted):
        raise ArithmeticError(f"compiled, and not: {wrong or 'a gradient is missing'}")
    return {"error": max(plain.values()), "compiled_error": max(found.values())}


def first_seconds(one: Pass) -> float:
    watch = timing.Stopwatch(one.device)
    one.run()
    return watch.seconds()


def peak(one: Pass) -> float:
    timing.reset_peak_memory(one.device)
    one.run()
    timing.synchronize(one.device)
    return timing.peak_memory(one.device) / 2**30


def measured(case: str, sizes: Sizes, repetitions: int, device: torch.device) -> dict[str, Any]:
    """One row: correctness, then seconds, peak memory in GiB and the first pass."""
    blocks = make_blocks(case, sizes, device)
    with fresh_cache():
        row: dict[str, Any] = check(blocks, sizes, device)
    one = Pass(blocks, sizes.tokens, sizes.documents, device)
    row |= {"first_s": first_seconds(one), "peak_gib": peak(one)}
    wanted = one.run()
    with compiled(blocks), fresh_cache():  # so that the first pass compiles everything
        plain, fused = swapped(blocks)
        row |= {"compiled_first_s": first_seconds(one), "compiled_peak_gib": peak(one)}
        row["difference"] = distance(one.run(), wanted)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(repetitions):
            for is_compiled, put in ((False, plain), (True, fused)):
                put()
                seconds[is_compiled] += timing.time_functions([one.run], device, repetitions=1, warmup=1)
    row |= {"s": statistics.median(seconds[False]), "compiled_s": statistics.median(seconds[True])}
    return row | {"ratio": row["s"] / row["compiled_s"]}


def line(row: dict[str, Any]) -> str:
    times = f"{1e3 * row['s']:9.1f} {1e3 * row['compiled_s']:9.1f} {row['ratio']:6.2f}"
    memory = f"{row['peak_gib']:7.2f} {row['compiled_peak_gib']:7.2f}"
    first = f"{row['first_s']:7.1f} {row['compiled_first_s']:7.1f}"
    errors = f"{row['error']:9.1e} {row['compiled_error']:9.1e} {row['difference']:9.1e}"
    return f"{row['case']:16} {row['layer_ops']:9} {times} {memory} {first} {errors}"


HEADER = (
    f"{'blocks':16} {'layer ops':9} {'plain ms':>9} {'compiled':>9} {'ratio':>6} {'GiB':>7} {'compil.':>7} "
    f"{'first s':>7} {'compil.':>7} {'error':>9} {'compiled':>9} {'between':>9}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--documents", type=int, default=0, help="packed in the row; 0: none")
    parser.add_argument("--layer-ops", nargs="*", choices=LAYER_OPS, default=list(LAYER_OPS))
    parser.add_argument("--no-checkpointing", action="store_true", help="without gradient checkpointing")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny blocks and 300 tokens, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    device, small = environment.default_device(), arguments.small
    sizes = Sizes(
        layers=min(2, arguments.layers) if small else arguments.layers,
        tokens=min(300, arguments.tokens) if small else arguments.tokens,
        documents=arguments.documents,
        checkpointing=not arguments.no_checkpointing,
        small=small,
    )
    about = {
        "device": environment.device_name(device),
        "commit": environment.source_commit(),
        "versions": environment.versions(),
    }
    about |= {"layers": sizes.layers, "tokens": sizes.tokens, "documents": sizes.documents}
    print(f"{about['device']}, {sizes}\n{HEADER}", flush=True)
    rows, path = [], arguments.out / "compiled_blocks.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in arguments.cases or CASES:
        for layer_ops in arguments.layer_ops:
            backends.FUSED_WITHOUT_GRADIENTS = LAYER_OPS[layer_ops]
            torch._dynamo.reset()
            try:
                row = measured(case, sizes, arguments.repetitions, device)
            except Exception as problem:  # the others are still worth their time
                print(f"{case} {layer_ops}: {type(problem).__name__}: {problem}"[:3000], flush=True)
                continue
            finally:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            rows.append({"case": case, "layer_ops": layer_ops} | row | {"checkpointing": sizes.checkpointing} | about)
            print(line(rows[-1]), flush=True)
            path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
