"""`statex bench model`: what an expansion costs a whole model, un-expanded and expanded side by side.

Random weights: the cost does not depend on them. On a CPU the models are two layers and only ratios are meaningful.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedConfig, PreTrainedModel

from statex.benchmarking.ops import BYTES_PER_SECOND
from statex.benchmarking.runner import run_cases
from statex.expansion.config import PRESETS
from statex.models.caches import cache_argument, cache_of
from statex.models.captured_step import CapturedStep
from statex.models.dispatch import statex_ops
from statex.models.expanded import expand
from statex.models.gla.configuration import GLAConfig
from statex.models.registration import register_families
from statex.utils import environment, timing

TOKENS, NEW_TOKENS = 16384, 64
CPU_TOKENS, CPU_NEW_TOKENS = 256, 8
BATCHES = (1, 32)


def gla_1300m(small: bool) -> PreTrainedConfig:
    if small:
        return GLAConfig(hidden_size=64, num_hidden_layers=2, num_heads=4, vocab_size=256)
    return GLAConfig()


def mamba2_1300m(small: bool) -> PreTrainedConfig:
    if small:
        return Mamba2Config(
            hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1, vocab_size=256
        )
    return Mamba2Config(
        hidden_size=2048, num_hidden_layers=48, num_heads=64, head_dim=64, state_size=128, n_groups=1, vocab_size=50288
    )


MODELS: dict[str, tuple[Callable[[bool], PreTrainedConfig], str]] = {
    "gla-1.3b": (gla_1300m, "paper-gla"),
    "mamba2-1.3b": (mamba2_1300m, "paper-mamba2"),
}


@dataclass(frozen=True)
class Case:
    """One way of running one model.

    Args:
        model: a name in MODELS.
        mode: "read" a context; "generate" from a prompt of one token; the "steps" of decoding alone, without
            generate's own work; the same steps as a CUDA "graph"; "compiled" steps and "static" generation, which
            transformers compiles.
        batch: rows.
    """

    model: str
    mode: str
    batch: int = 1

    @property
    def needs_cuda(self) -> bool:
        return self.mode in ("graph", "compiled", "static")


CASES = {
    f"{model}-{mode}" + (f"-b{batch}" if mode != "read" else ""): Case(model, mode, batch)
    for model in MODELS
    for mode in ("read", "generate", "steps", "graph", "compiled", "static")
    for batch in (BATCHES if mode != "read" else (1,))
}


def run_model_benchmark(
    cases: Sequence[str] | None = None, out: Path | None = None, *, device: torch.device | str | None = None
) -> list[dict]:
    """Time reading a context and generating from it, un-expanded and expanded; print a table to stderr.

    Args:
        cases: names out of `CASES`, some of which need CUDA; default: all that fit the device.
        out: folder for model.json.
        device: default: CUDA where there is one.

    Returns:
        one record a case. For each of the two models ("unexpanded_", "expanded_"): milliseconds a token, the share of
        the memory floor in it (decoding; see `floor_bytes`), peak memory in bytes, seconds of the first call. On a CPU
        these are null, and the ratio expanded / unexpanded remains.

    Raises:
        UserError: an unknown case.
    """
    device = torch.device(device) if device is not None else environment.default_device()
    known = [name for name, case in CASES.items() if device.type == "cuda" or not case.needs_cuda]
    models: dict[str, list[PreTrainedModel]] = {}
    register_families()

    def run_case(name: str, device: torch.device) -> list[dict]:
        case = CASES[name]
        if case.model not in models:
            models.clear()  # only one pair has to fit into memory
            models[case.model] = _models(case.model, device)
        return [{"case": name} | _run_case(case, models[case.model], device)]

    return run_cases(cases, known, run_case, _line, device, out / "model.json" if out is not None else None)


def _run_case(case: Case, models: list[PreTrainedModel], device: torch.device) -> dict[str, Any]:
    on_cuda = device.type == "cuda"
    reading, decoding = (TOKENS, NEW_TOKENS) if on_cuda else (CPU_TOKENS, CPU_NEW_TOKENS)
    tokens = reading if case.mode == "read" else decoding
    record: dict[str, Any] = {"model": case.model, "mode": case.mode, "batch": case.batch, "tokens": tokens}
    if case.mode in ("compiled", "static"):
        torch._dynamo.reset()  # or a second batch size would be compiled for any batch size
    with statex_ops(), torch.no_grad():
        runs = []
        for label, model in zip(("unexpanded", "expanded"), models, strict=True):
            watch = timing.Stopwatch(device)
            runs.append(RUNS[case.mode](model, case.batch, tokens))
            runs[-1]()
            record[f"{label}_first_call_s"] = watch.seconds() if on_cuda else None
        seconds = timing.time_functions(runs, device, repetitions=5, warmup=1)
        for label, model, run, value in zip(("unexpanded", "expanded"), models, runs, seconds, strict=True):
            timing.reset_peak_memory(device)
            run()
            record[f"{label}_peak_bytes"] = timing.peak_memory(device) if on_cuda else None
            record[f"{label}_ms"] = 1e3 * value if on_cuda else None
            record[f"{label}_ms_per_token"] = 1e3 * value / tokens if on_cuda else None
            record |= _floor(label, model, case, value / tokens, device)
    return record | {"ratio": seconds[1] / seconds[0]}


def floor_bytes(model: PreTrainedModel, batch: int) -> int:
    """Bytes that decoding one token in every row must move: each weight but the embeddings is read once, each state is
    read and written."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight is not model.get_output_embeddings().weight:
        weights -= embeddings.weight.numel() * embeddings.weight.element_size()
    cache = cache_of(model(torch.zeros((batch, 1), dtype=torch.long, device=model.device), use_cache=True))
    states = [
        x for layer in cache.layers for held in (layer.conv_states, layer.recurrent_states) for x in held.values()
    ]
    return weights + 2 * sum(x.numel() * x.element_size() for x in states if x is not None)


def _floor(label: str, model: PreTrainedModel, case: Case, seconds: float, device: torch.device) -> dict[str, Any]:
    """The memory floor of a decoded token in ms, and its share in what it took; null where neither is known."""
    names = f"{label}_floor_ms", f"{label}_floor_share"
    rate = next((rate for name, rate in BYTES_PER_SECOND.items() if name in environment.device_name(device)), None)
    if case.mode == "read" or rate is None:
        return dict.fromkeys(names)
    floor = floor_bytes(model, case.batch) / rate
    return dict(zip(names, (1e3 * floor, floor / seconds), strict=True))


def _models(name: str, device: torch.device) -> list[PreTrainedModel]:
    """The un-expanded and the expanded model, with random weights."""
    make, preset = MODELS[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        models = [AutoModelForCausalLM.from_config(make(device.type == "cpu"), dtype=dtype) for _ in range(2)]
    expand(models[1], PRESETS[preset])
    return [model.to(device).eval() for model in models]


def _ids(model: PreTrainedModel, batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)


def _reading(model: PreTrainedModel, batch: int, tokens: int) -> Callable[[], object]:
    ids = _ids(model, batch, tokens)
    return lambda: model(ids, logits_to_keep=1)


def _generating(model: Any, batch: int, tokens: int, **options: Any) -> Callable[[], object]:
    """Generate `tokens` after a prompt of one token, greedily and never stopping early."""
    ids = _ids(model, batch, 1)
    options |= {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _static(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    return _generating(model, batch, tokens, cache_implementation="static")


def _steps(model: Any, batch: int, tokens: int, forward: Callable | None = None) -> Callable[[], object]:
    """Decode `tokens` greedily; where they start does not matter for the time they take."""
    first = model(_ids(model, batch, 1), use_cache=True)
    cache = {cache_argument(model): cache_of(first)}

    def run() -> None:
        ids = first.logits[:, -1:].argmax(dim=-1)
        for _ in range(tokens):
            output = (forward or model)(input_ids=ids, use_cache=True, **cache)
            ids = output.logits[:, -1:].argmax(dim=-1)

    return run


def _compiled(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    """The steps by the call that generate compiles for a static cache."""
    return _steps(model, batch, tokens, model.get_compiled_call(None))


def _graph(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    first = model(_ids(model, batch, 1), use_cache=True)
    step = CapturedStep(model, cache_of(first), batch)

    def run() -> None:
        ids = first.logits[:, -1].argmax(dim=-1)
        for _ in range(tokens):
            ids = step(ids).argmax(dim=-1)

    return run


RUNS: dict[str, Callable[[PreTrainedModel, int, int], Callable[[], object]]] = {
    "read": _reading,
    "generate": _generating,
    "steps": _steps,
    "graph": _graph,
    "compiled": _compiled,
    "static": _static,
}


def _line(record: dict) -> str:
    def show(label: str) -> str:
        values = [record[f"{label}_{key}"] for key in ("ms_per_token", "floor_share", "peak_bytes", "first_call_s")]
        if values[0] is None:
            return f"{label} -"
        share = f" ({values[1]:4.0%} floor)" if values[1] is not None else ""
        return f"{label} {values[0]:7.4f} ms a token{share}, {values[2] / 1e9:5.2f} GB, first call {values[3]:5.1f} s"

    return f"{record['case']:25} {show('unexpanded')}; {show('expanded')}; ratio {record['ratio']:5.2f}"
