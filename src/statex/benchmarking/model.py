"""`statex bench model`: what an expansion costs a whole model, un-expanded and expanded side by side.

Random weights: the cost does not depend on them. On a CPU the models are two layers and the figures are ratios only.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedConfig, PreTrainedModel

from statex import measure
from statex.benchmarking.runner import run_cases
from statex.expansion.config import PRESETS
from statex.models.dispatch import statex_ops
from statex.models.expanded import expand
from statex.models.gla.configuration import GLAConfig

TOKENS, NEW_TOKENS = 16384, 64
CPU_TOKENS, CPU_NEW_TOKENS = 256, 8


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


CASES: dict[str, tuple[Callable[[bool], PreTrainedConfig], str]] = {
    "gla-1.3b": (gla_1300m, "paper-gla"),
    "mamba2-1.3b": (mamba2_1300m, "paper-mamba2"),
}


def run_model_benchmark(
    cases: Sequence[str] | None = None, out: Path | None = None, *, device: torch.device | str | None = None
) -> list[dict]:
    """Time reading a context and generating from it, un-expanded and expanded; print a table to stderr.

    Args:
        cases: names out of `CASES`; default: all.
        out: folder for model.json.
        device: default: CUDA where there is one.

    Returns:
        one record a case, batch and what was timed ("read", "generate"): milliseconds of the whole and of one token
        for both models (null on a CPU), and the ratio expanded / un-expanded.

    Raises:
        UserError: an unknown case.
    """
    return run_cases(cases, CASES, _run_case, _line, device, out / "model.json" if out is not None else None)


def _run_case(name: str, device: torch.device) -> list[dict]:
    on_cuda = device.type == "cuda"
    tokens, new_tokens = (TOKENS, NEW_TOKENS) if on_cuda else (CPU_TOKENS, CPU_NEW_TOKENS)
    models = _models(name, device)
    records = []
    with statex_ops(), torch.inference_mode():
        for what, batch in (("read", 1), ("generate", 1), ("generate", 32)):
            count = tokens if what == "read" else new_tokens
            runs = [_reading(model, count) if what == "read" else _generating(model, batch, count) for model in models]
            seconds = measure.time_functions(runs, device, repetitions=5, warmup=2)
            record = {"case": name, "what": what, "batch": batch, "tokens": count}
            record |= {"ratio": seconds[1] / seconds[0]}
            for label, value in zip(("unexpanded", "expanded"), seconds, strict=True):
                record[f"{label}_ms"] = 1e3 * value if on_cuda else None
                record[f"{label}_ms_per_token"] = 1e3 * value / count if on_cuda else None
            records.append(record)
    return records


def _models(name: str, device: torch.device) -> list[PreTrainedModel]:
    """The un-expanded and the expanded model, with random weights."""
    make, preset = CASES[name]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    models = [AutoModelForCausalLM.from_config(make(device.type == "cpu"), dtype=dtype).to(device) for _ in range(2)]
    expand(models[1], PRESETS[preset])
    return [model.eval() for model in models]


def _reading(model: PreTrainedModel, tokens: int) -> Callable[[], object]:
    ids = torch.randint(model.config.vocab_size, (1, tokens), device=model.device)
    return lambda: model(ids, logits_to_keep=1)


def _generating(model: Any, batch: int, tokens: int) -> Callable[[], object]:
    """Generate `tokens` after a prompt of one token, greedily and never stopping early."""
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=model.device)
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def _line(record: dict) -> str:
    def show(key: str) -> str:
        return "       -" if record[key] is None else f"{record[key]:8.3f}"

    return (
        f"{record['case']:14} {record['what']:9} batch {record['batch']:3} un-expanded {show('unexpanded_ms')} ms "
        f"({show('unexpanded_ms_per_token')} a token), expanded {show('expanded_ms')} ms "
        f"({show('expanded_ms_per_token')} a token), ratio {record['ratio']:5.2f}"
    )
