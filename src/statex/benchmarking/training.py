"""`statex bench training`: whole steps of the project's own trainer, blocks compiled and not, beside FLA's GLA.

Random weights and random tokens, ready-made: what is measured is the step. Both ways see the same batches, and no time
is printed where their losses differ. On a CPU the models are tiny and only ratios are meaningful.
"""

import gc
import importlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    PreTrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from statex.benchmarking.model import gla_1300m, mamba2_1300m
from statex.benchmarking.ops import FLOPS_PER_SECOND
from statex.benchmarking.runner import run_cases
from statex.data.mixture import num_groups, rank_part
from statex.errors import UserError
from statex.expansion.config import PRESETS, user_error
from statex.models.dispatch import statex_ops
from statex.models.expanded import expand
from statex.models.gla.configuration import GLAConfig
from statex.models.registration import register_families
from statex.recipe import Training
from statex.settings import Data
from statex.training.arguments import training_arguments
from statex.training.captured import captures
from statex.training.loader import TimedLoader
from statex.training.trainer import StatexTrainer
from statex.utils import environment, timing

TOKENS_PER_STEP, CPU_TOKENS_PER_STEP = 65536, 256
STEPS, WARMUP = 20, 8  # the first steps compile, and settle how many blocks keep their activations
PROFILED = 2  # steps under the profiler
LEARNING_RATE = 1e-5  # so low that AdamW's first steps, of which only the sign of a gradient counts, part no losses
ROUNDING = 2.0**-8
"""How much the losses of two ways may differ in any step, as a share of the loss. Steps compute in bf16, which rounds
each logit to within 2**-8 of its size, and another order of sums rounds some of them to the neighbouring number. Logits
of random weights are as large as the loss (a Mamba2 of 1.3B begins at 20.5 nats, and not at the logarithm of its
vocabulary): no bound in nats fits all models."""

KINDS = {  # of kernels, by what their names contain; the first that fits
    "recurrences": ("attention", "scores", "score_gradient", "walk", "prefix", "prepare", "rebase", "output_kernel",
                    "inside_gradient", "key_gradient", "decay_gradient", "sums_kernel", "scale_kernel", "chunk_"),
    "convolutions and gated norms": ("convolution", "gated_norm", "causal_conv", "layer_norm"),
    "products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "splitk", "cublas"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "fused_optimizer"),
    "elementwise, compiled": ("triton_",),
    "copies": ("memcpy", "memset"),
}  # fmt: skip


def gla_45m(small: bool) -> PreTrainedConfig:
    if small:
        return gla_1300m(small)
    return GLAConfig(hidden_size=512, num_hidden_layers=12, num_heads=4, vocab_size=32000, tie_word_embeddings=True)


def mamba2_45m(small: bool) -> PreTrainedConfig:
    if small:
        return mamba2_1300m(small)
    return Mamba2Config(
        hidden_size=512, num_hidden_layers=24, num_heads=16, head_dim=64, state_size=64, n_groups=1, vocab_size=32000,
        tie_word_embeddings=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Training steps of one model.

    Args:
        config: its configuration, or a small one.
        length: tokens of a sequence; a step has 65,536 tokens.
        preset: of its expansion.
        recomputed: with gradient checkpointing, as much of it as memory asks for.
        peer: FLA's model of this configuration in transformers' own trainer.
    """

    config: Callable[[bool], PreTrainedConfig]
    length: int
    preset: str | None = None
    recomputed: bool = False
    peer: bool = False


CASES = {
    "gla-1.3b-64k": Case(gla_1300m, 65536, recomputed=True),
    "gla-1.3b-64k-expanded": Case(gla_1300m, 65536, "paper-gla", recomputed=True),
    "gla-1.3b-64k-fla": Case(gla_1300m, 65536, recomputed=True, peer=True),
    "mamba2-1.3b-64k": Case(mamba2_1300m, 65536, recomputed=True),
    "mamba2-1.3b-64k-expanded": Case(mamba2_1300m, 65536, "paper-mamba2", recomputed=True),
    "gla-45m-2k": Case(gla_45m, 2048),
    "gla-45m-16k": Case(gla_45m, 16384),
    "mamba2-45m-2k": Case(mamba2_45m, 2048),
    "mamba2-45m-16k": Case(mamba2_45m, 16384),
}


FIXED = {
    "steps", "warmup_steps", "tokens_per_step", "sequence_length", "save_every", "log_every", "learning_rate",
    "compile", "weights", "train_only_expanded",
}  # fmt: skip
"""Keys of the section `training` that the benchmark sets, or makes no use of."""


def run_training_benchmark(
    cases: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    changes: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Time whole training steps; print a table to stderr.

    Args:
        cases: names out of `CASES`; FLA's needs a GPU and fla. Default: all but FLA's where it cannot run.
        out: folder for training.json.
        changes: of other keys of a recipe's section `training`; with any, FLA's model, which knows none, is left out.
        device: default: CUDA where there is one.

    Returns:
        one record a case and way ("plain", "compiled", "fla"): `step_s` (mean of the last 12 of 20 steps by the wall
        clock, from finished work to finished work; nothing waits for the device in between), `tokens_per_second`,
        `first_step_s`, `peak_bytes`, `data_wait` (the share of `step_s`), `mfu` (6 operations a parameter and
        token against the device's measured bf16 product), `hfu` (with those computed again), the `changes`,
        whether steps were CUDA graphs (`cuda_graphs`), `blocks_kept`, `losses` and how much they differ at most, and
        `kernels`: seconds of a step by kind, counted in steps launched one by one. On a CPU no absolute times.

    Raises:
        UserError: an unknown case, or changes of keys that are unknown or in FIXED, or to values that a case refuses.
        ArithmeticError: the losses of the compiled steps are not those of the plain ones.
    """
    device = torch.device(device) if device is not None else environment.default_device()
    changes = changes or {}
    for key in sorted(changes.keys() & FIXED):
        problem = "cannot be changed: the benchmark sets it or does not use it"
        raise UserError(f"training.{key}", changes[key], problem, "leave it out")
    peers = device.type == "cuda" and importlib.util.find_spec("fla") is not None and not changes
    known = [name for name, case in CASES.items() if peers or not case.peer]
    for name in set(cases or known) & set(known):
        for way in _ways(CASES[name]):  # wrong changes are refused before any case is run
            _section(CASES[name], way, TOKENS_PER_STEP, changes)
    register_families()
    path = out / "training.json" if out is not None else None
    return run_cases(cases, known, partial(_run_case, changes=changes), _line, device, path)


def _ways(case: Case) -> tuple[str, ...]:
    return ("fla",) if case.peer else ("plain", "compiled")


def _run_case(name: str, device: torch.device, changes: dict[str, Any]) -> list[dict[str, Any]]:
    case, records = CASES[name], []
    ways = _ways(case)
    for way in ways:
        with tempfile.TemporaryDirectory() as folder:
            record = _measured(case, way, device, Path(folder), changes)
            records.append({"case": name, "way": way, "changes": changes} | record)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    differs = require_same_losses(name, ways, [record["losses"] for record in records])
    plain = records[0]["step_s"]
    for record in records:
        record |= {"losses_differ": differs, "plain_to_this": plain / record["step_s"]}
        if device.type != "cuda":
            record |= dict.fromkeys(("step_s", "tokens_per_second", "first_step_s", "peak_bytes"))
    return records


def require_same_losses(name: str, ways: Sequence[str], losses: Sequence[Sequence[float]]) -> float:
    """The largest difference, in nats, between the first and the last way's losses of one step.

    Args:
        name: the case's, for the error.
        ways: their names.
        losses: of each way, those of all steps.

    Raises:
        ArithmeticError: in some step it is more than `ROUNDING` of the first way's loss, or not a number.
    """
    pairs = list(zip(losses[0], losses[-1], strict=True))
    for step, (loss, other) in enumerate(pairs):
        bound = ROUNDING * abs(loss)
        if not abs(loss - other) <= bound:
            raise ArithmeticError(
                f"{name}: in step {step}, counted from 0, the losses of {' and '.join(ways)}, {loss:.5g} and "
                f"{other:.5g} nats, differ by {abs(loss - other):.3g}; rounding logits to bf16 accounts for "
                f"{bound:.3g}, 2**-8 of the loss"
            )
    return max(abs(loss - other) for loss, other in pairs)


def _measured(case: Case, way: str, device: torch.device, folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """20 steps, and a few more under the profiler."""
    on_cuda = device.type == "cuda"
    section = _section(case, way, TOKENS_PER_STEP if on_cuda else CPU_TOKENS_PER_STEP, changes)
    trainer, record = timed_training(case, section, folder, warmup=WARMUP)
    return record | {"kernels": _kinds_of_kernels(trainer) if on_cuda else None}


def _section(case: Case, way: str, tokens: int, changes: dict[str, Any]) -> Training:
    recomputed = changes.get("gradient_checkpointing", case.recomputed)
    values: dict[str, Any] = {
        "steps": STEPS, "warmup_steps": 2, "tokens_per_step": tokens, "sequence_length": min(case.length, tokens),
        "save_every": STEPS, "log_every": STEPS, "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": case.recomputed, "compile": way == "compiled",
        "activation_memory": "most" if recomputed is True and not case.peer else "least",
    }  # fmt: skip
    try:
        return Training.model_validate(values | changes)
    except ValidationError as error:
        cause = user_error(error)
        raise UserError(f"training.{cause.field}", cause.value, cause.problem, cause.remedy) from None


def timed_training(case: Case, section: Training, folder: Path, *, warmup: int) -> tuple[Any, dict[str, Any]]:
    """All steps of a section on random tokens, by this process or by all that torchrun has started.

    Args:
        case: its model; the lengths, and what is computed again, are the section's.
        folder: for what the trainer writes.
        warmup: steps before those whose time counts.

    Returns:
        the trainer, and a record as of `run_training_benchmark` without `kernels`; `tokens_per_second` of all processes
        together, `mfu` and `hfu` of their mean, `peak_bytes` and `losses` of this process.
    """
    torch.manual_seed(0)
    trainer = _trainer(case, section, folder)
    device, steps, tokens = trainer.args.device, section.steps, section.tokens_per_step
    model = trainer.model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once, and so do
    if not model.config.tie_word_embeddings:  # embeddings that are looked up count nothing
        num_parameters -= model.get_input_embeddings().weight.numel()
    clock = _Clock(device, trainer.get_train_dataloader(), (1, warmup, steps))
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    if isinstance(trainer, StatexTrainer):
        trainer.train_to_the_end()
    else:
        trainer.train()
    seconds = (clock.times[steps] - clock.times[warmup]) / (steps - warmup)
    kept, blocks = _kept(trainer, case)
    rate = next((rate for name, rate in FLOPS_PER_SECOND.items() if name in environment.device_name(device)), None)
    world_size = trainer.args.world_size
    floor = 6 * num_parameters * tokens / (rate * world_size) if rate is not None else None
    return trainer, {
        "tokens": tokens,
        "length": section.sequence_length,
        "parameters": num_parameters,
        "step_s": seconds,
        "tokens_per_second": tokens / seconds,
        "first_step_s": clock.times[1] - clock.times[0],
        "peak_bytes": timing.peak_memory(device),
        "mfu": floor / seconds if floor is not None else None,
        "hfu": floor / seconds * (1 + (1 - kept / blocks) / 3) if floor is not None else None,
        "data_wait": (clock.waited[steps] - clock.waited[warmup]) / (clock.times[steps] - clock.times[warmup]),
        "cuda_graphs": not case.peer and captures(model.config, section, Data(), device, world_size),
        "blocks_kept": kept,
        "blocks": blocks,
        "losses": [loss.item() for loss in trainer.losses],
    }


def _kept(trainer: Any, case: Case) -> tuple[int, int]:
    if isinstance(trainer, StatexTrainer):
        return trainer.blocks.num_kept, len(trainer.blocks.blocks)
    blocks = trainer.model.config.num_hidden_layers
    return 0 if case.recomputed else blocks, blocks


def _trainer(case: Case, section: Training, folder: Path) -> Any:
    arguments = training_arguments(section, folder, seed=0, quiet=True)
    device = arguments.device
    config = case.config(device.type != "cuda")
    loader = _loader(config.vocab_size, section, arguments)
    if case.peer:
        network = _fla_model(config, device)
        if case.recomputed:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return _with_batches(Trainer, loader)(model=network, args=arguments)
    with device:
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plan = expand(network, PRESETS[case.preset]) if case.preset is not None else None
    return _with_batches(StatexTrainer, loader)(
        model=network, args=arguments, output=folder, processing_class=None, data=Data(), training=section,
        fresh_tensors=plan.fresh_tensors if plan is not None else set(),
    )  # fmt: skip


def _with_batches(trainer_class: type[Trainer], loader: DataLoader) -> Any:
    class WithBatches(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs)
            self.losses: list[torch.Tensor] = []  # of each step, still on the device

        def get_train_dataloader(self) -> DataLoader:
            return loader

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.losses.append(super().training_step(*args, **kwargs))
            return self.losses[-1]

    return WithBatches


def _loader(vocab_size: int, section: Training, arguments: TrainingArguments) -> TimedLoader:
    """A batch for each step: this process's sequences of it, or its slices of them."""
    group, part = divmod(arguments.process_index, section.sequence_parallel)
    generator = torch.Generator().manual_seed(group)
    rows = section.tokens_per_step // section.sequence_length // num_groups(section, arguments.world_size)
    batches = []
    for _ in range(section.steps + PROFILED):
        ids = torch.randint(vocab_size, (rows, section.sequence_length), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        batches.append(rank_part(batch, section, part))
    return TimedLoader(batches, arguments.device, workers=2 if arguments.device.type == "cuda" else 0)


def _fla_model(config: Any, device: torch.device) -> Any:
    models = importlib.import_module("fla.models")
    fields = {"hidden_size", "num_hidden_layers", "num_heads", "vocab_size", "intermediate_size", "tie_word_embeddings"}
    own = models.GLAConfig(**{field: getattr(config, field) for field in fields}, use_cache=False)
    with device:
        return models.GLAForCausalLM(own)


class _Clock(TrainerCallback):
    """When training began and when the device had finished the steps of `marks`, and how long data was waited for."""

    def __init__(self, device: torch.device, loader: TimedLoader, marks: tuple[int, ...]):
        self.device, self.loader, self.marks = device, loader, marks
        self.times: dict[int, float] = {}
        self.waited: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.times:
            self._mark(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.marks:
            self._mark(state.global_step)
        if state.global_step == 1:  # what is captured as a graph allocates nothing after its third step
            timing.reset_peak_memory(self.device)

    def _mark(self, step: int) -> None:
        timing.synchronize(self.device)
        self.times[step], self.waited[step] = time.perf_counter(), self.loader.waited


def _kinds_of_kernels(trainer: Any) -> dict[str, float]:
    """Seconds of a training step by kind of kernel, its optimizer's step included."""
    model, batches = trainer.model, iter(trainer.get_train_dataloader())
    running = trainer.blocks.running() if isinstance(trainer, StatexTrainer) else nullcontext()
    with statex_ops(), running, profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            trainer.training_step(model, next(batches))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
        timing.synchronize("cuda")
    seconds: dict[str, float] = {}
    for event in profiler.key_averages():
        if (taken := event.self_device_time_total) > 0:
            kind = next(
                (kind for kind, parts in KINDS.items() if any(p in event.key.lower() for p in parts)), "elementwise"
            )
            seconds[kind] = seconds.get(kind, 0.0) + taken / 1e6 / PROFILED
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _line(record: dict[str, Any]) -> str:
    start = f"{record['case']:25} {record['way']:8}"
    if record["step_s"] is None:
        return f"{start} {record['plain_to_this']:5.2f} times as fast as plain steps"
    share = f"MFU {record['mfu']:4.0%}, HFU {record['hfu']:4.0%}" if record["mfu"] is not None else ""
    kernels = ", ".join(f"{kind} {seconds:.3f}" for kind, seconds in (record["kernels"] or {}).items())
    return (
        f"{start} {record['step_s']:7.4f} s, {record['tokens_per_second'] / 1e3:7.1f}K tokens/s, {share}, "
        f"{record['peak_bytes'] / 1e9:5.1f} GB, data wait {record['data_wait']:.1%}, "
        f"first step {record['first_step_s']:5.1f} s, "
        f"{record['blocks_kept']} of {record['blocks']} blocks kept; {kernels}"
    )
