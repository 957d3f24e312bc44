"""Runs the operations on slices of sequences in forked gloo ranks, against whole sequences.

Each rank has the whole inputs, computes on its slice with `sequence_parallel`, and compares what it gets. Started by
torchrun, the ranks are its processes, each with its GPU where there are some.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from recurrence_inputs import (
    assert_close,
    delta_inputs,
    generalized_delta_inputs,
    gla_inputs,
    kda_inputs,
    selective_scan_inputs,
    ssd_inputs,
)
from torch.utils.checkpoint import checkpoint

from statex.ops import (
    carried_state,
    gated_delta,
    generalized_delta,
    gla,
    gla_step,
    selective_scan,
    sequence_parallel,
    short_convolution,
    ssd,
    use_backend,
)
from statex.ops.segments import cu_seqlens_of

TOKENS = 36
RECURRENCES = (
    (gla, gla_inputs),
    (ssd, ssd_inputs),
    (gated_delta, delta_inputs),
    (gated_delta, kda_inputs),
)
IN_TORCH = ((generalized_delta, generalized_delta_inputs), (selective_scan, selective_scan_inputs))  # on all devices
PER_TOKEN = {"q", "k", "v", "log_decay", "beta", "a", "b", "x", "dt", "B", "C"}


def of_rank(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def run(operation, inputs: dict, *, sliced: bool, whole_state: bool) -> dict[str, torch.Tensor]:
    """Output, final state and gradients of a projection of both; those of weights summed over the ranks if sliced."""
    cut = of_rank if sliced else (lambda x: x)
    leaves = {name: (cut(x) if name in PER_TOKEN else x).detach().requires_grad_() for name, x in inputs.items()}
    given = dict(leaves)
    if sliced and dist.get_rank() > 0:
        given.pop("initial_state", None)
        given.pop("left_context", None)
    output, state = operation(**given)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    loss = (output * cut(torch.randn(2, TOKENS, *output.shape[2:], generator=generator))).sum()
    results = {"output": output}
    if whole_state and (not sliced or dist.get_rank() == dist.get_world_size() - 1):
        loss = loss + (state * torch.randn(state.shape, generator=generator)).sum()
        results["final_state"] = state
    loss.backward()
    for name, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if sliced and name not in PER_TOKEN:
            dist.all_reduce(gradient)
        results[f"gradient of {name}"] = gradient
    return {name: x.detach() for name, x in results.items()}


BOUND = {"torch": 1e-5, "triton": 1e-4}
"""Relative; of the kernels what their own tests ask for in fp32, and ten times that of d A, whose terms cancel."""
DECAYS = {"torch": ("none", "typical", "strong", "channels", "tokens"), "triton": ("typical", "channels")}


def compare(
    operation, inputs: dict, *, seq_idx: torch.Tensor | None = None, whole_state: bool = True, backend: str
) -> None:
    """`operation` is called with this slice's seq_idx as its first argument."""
    inputs = {name: x.float() for name, x in inputs.items()}
    wanted = run(partial(operation, seq_idx), inputs, sliced=False, whole_state=whole_state)
    local = None if seq_idx is None else of_rank(seq_idx)
    with sequence_parallel(dist.group.WORLD, local):
        got = run(partial(operation, local), inputs, sliced=True, whole_state=whole_state)
    for name in wanted:
        if name == "output" or name.removeprefix("gradient of ") in PER_TOKEN:
            wanted[name] = of_rank(wanted[name])
    wanted, bound, of_sum = {name: wanted[name] for name in got}, BOUND[backend], {"gradient of A"}
    if backend == "triton" and of_sum & set(got):
        assert_close({name: got.pop(name) for name in of_sum}, {name: wanted.pop(name) for name in of_sum}, 10 * bound)
    assert_close(got, wanted, bound)


def packed(recurrence, seq_idx, **inputs):
    """A recurrence over packed rows laid end to end, as mixers call it."""
    rows = {name: x.reshape(1, -1, *x.shape[2:]) if name in PER_TOKEN else x for name, x in inputs.items()}
    output, states = recurrence(**rows, cu_seqlens=cu_seqlens_of(seq_idx), output_final_state=True)
    return output.view(*seq_idx.shape, *output.shape[2:]), states[-1]


def plain(recurrence, seq_idx, **inputs):
    return recurrence(**inputs, output_final_state=True)


def recomputed(recurrence, seq_idx, **inputs):
    return checkpoint(partial(recurrence, output_final_state=True), use_reentrant=False, **inputs)


def convolved(seq_idx, x, weight, bias, **context):
    return short_convolution(x, weight, bias, seq_idx=seq_idx, **context), None


def documents() -> torch.Tensor:
    """Rows of one and of four documents, borders inside slices and at them."""
    seq_idx = torch.zeros(2, TOKENS, dtype=torch.int32)
    for begin in (5, 9, 18, 30):
        seq_idx[1, begin:] += 1
    return seq_idx


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def check_all(backend: str = "torch") -> None:
    """Whatever one rank computes, on PyTorch's path or by the kernels."""
    with use_backend(backend):
        _check_operations(partial(compare, backend=backend), DECAYS[backend])
    for recurrence, make in IN_TORCH:
        _check_recurrence(partial(compare, backend="torch"), recurrence, make, DECAYS["triton"])
    _check_segments()
    _check_refusals()


def _check_operations(compare: Callable, decays: tuple[str, ...]) -> None:
    for recurrence, make in RECURRENCES:
        _check_recurrence(compare, recurrence, make, decays if recurrence in (gla, ssd) else decays[:2])
    inputs = {"x": torch.randn(2, TOKENS, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)}
    compare(convolved, inputs, whole_state=False)
    compare(convolved, inputs, seq_idx=documents(), whole_state=False)
    compare(convolved, inputs | {"left_context": torch.randn(2, 2, 6)}, whole_state=False)


def _check_recurrence(compare: Callable, recurrence: Callable, make: Callable, decays: tuple[str, ...]) -> None:
    for decay in decays:
        compare(partial(plain, recurrence), make(TOKENS, decay))
    compare(partial(recomputed, recurrence), make(TOKENS))
    inputs = make(TOKENS)
    del inputs["initial_state"]
    compare(partial(packed, recurrence), inputs, seq_idx=documents())


class _Mixer(torch.nn.Module):
    def __init__(self, operation):
        super().__init__()
        self.forward = operation


def _check_segments() -> None:
    """Slices of segments that carry their states, against whole sequences."""
    segments = 2 if dist.get_world_size() == 2 else 3
    cases = [(partial(plain, recurrence), make(TOKENS)) for recurrence, make in RECURRENCES + IN_TORCH]
    cases += [(convolved, {"x": torch.randn(2, TOKENS, 6), "weight": torch.randn(6, 4), "bias": torch.randn(6)})]
    for operation, inputs in cases:
        inputs = {name: x.float() for name, x in inputs.items()}
        inputs.pop("initial_state", None)
        for seq_idx in (None, documents()):
            run = operation if seq_idx is None or operation is convolved else partial(packed, *operation.args)
            wanted, mixer, got = run(seq_idx, **inputs)[0], _Mixer(run), []
            with carried_state([mixer]) as carried:
                for number in range(segments):
                    part = {
                        name: of_rank(x.chunk(segments, 1)[number]) if name in PER_TOKEN else x
                        for name, x in inputs.items()
                    }
                    local = None if seq_idx is None else of_rank(seq_idx.chunk(segments, 1)[number])
                    with sequence_parallel(dist.group.WORLD, local), carried.segment(local):
                        got.append(mixer(local, **part)[0])
            wanted = [of_rank(each) for each in wanted.chunk(segments, 1)]
            assert_close({"output": torch.cat(got, 1)}, {"output": torch.cat(wanted, 1)}, 1e-5)


def _check_refusals() -> None:
    q = torch.randn(1, 8, 2, 4)
    with sequence_parallel(dist.group.WORLD):
        refused(lambda: gla(q, q, q, -q.abs(), cu_seqlens=torch.tensor([0, 8])), "give it to sequence_parallel")
        refused(
            lambda: gla_step(q[:, 0], q[:, 0], q[:, 0], -q[:, 0].abs(), torch.zeros(1, 2, 4, 4)),
            "gla_step cannot run on a part",
        )
        refused(lambda: short_convolution(q[:, :2, 0], torch.randn(4, 4)), "fewer than the 3")
        refused(lambda: sequence_parallel(dist.group.WORLD).__enter__(), "inside another")
        if dist.get_rank() > 0:
            state = torch.zeros(1, 2, 4, 4)
            refused(lambda: gla(q, q, q, -q.abs(), initial_state=state), "only the first rank")


def main(ranks: int, folder: Path, check: Callable[[], None]) -> None:
    """Run `check` in so many forked ranks, which meet in `folder`."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            store = f"file://{folder}/store-{ranks}"
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
            )
            torch.manual_seed(0)
            check()
            dist.barrier()
            os._exit(0)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ended == [0] * ranks, ended


def under_torchrun(check: Callable[[], None]) -> None:
    """Run `check` in each of torchrun's processes, by NCCL on the GPU of each, or by gloo where there is none."""
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo", timeout=timedelta(seconds=60))
    torch.set_default_device(device)
    torch.manual_seed(0)
    check()
    dist.barrier()
    dist.destroy_process_group()


def check_backends() -> None:
    check_all("torch")
    if torch.cuda.is_available():
        check_all("triton")


if __name__ == "__main__":
    under_torchrun(check_backends)
