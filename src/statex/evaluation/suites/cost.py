"""Cost: state bytes, prefill speed by length, decode time by batch, peak memory, on the current device.

Speeds are of random tokens through the model's own forward with its cache, as `generate` would run it: prefill at
batch 1, decoding as milliseconds for one more token in every row. On CUDA the models that statex expands are also
decoded by a captured graph (`CapturedStep`): the time of their layers without launching kernels one by one. Each
repetition is an item, so a value has an interval; it shows how steady the machine was, not how machines differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pydantic import Field

from statex.evaluation.context import Context
from statex.evaluation.records import Score, item_score
from statex.evaluation.suite import Cell, Suite
from statex.settings import BatchSizes, Lengths, Section

if TYPE_CHECKING:
    import torch

    from statex.evaluation.reader import Reader, State
    from statex.models.captured_step import CapturedStep

DEFAULT_LENGTHS = {"cpu": (512, 2048), "cuda": (2048, 16_384, 65_536)}


READ_FIRST = 16
"""Tokens of each row that decoding continues."""


class CostSettings(Section):
    lengths: Lengths | None = Field(default=None, description="tokens; default: what the device allows")
    batch_sizes: BatchSizes = Field(default=[1, 8], description="rows decoded at once")
    decode_tokens: int = Field(default=32, ge=1, le=2**20, description="tokens per row in one repetition")
    repetitions: int = Field(default=5, ge=2, le=10_000)


def check(context: Context) -> None:
    """Refuse more tokens than the model can read."""
    settings = context.settings("cost")
    for length in settings.lengths or []:
        context.check_length("evaluation.cost.lengths", length)
    context.check_length("evaluation.cost.decode_tokens", settings.decode_tokens, READ_FIRST + settings.decode_tokens)


def cells(context: Context) -> list[Cell]:
    settings = context.settings("cost")
    lengths = settings.lengths or DEFAULT_LENGTHS.get(context.reader.device.type, DEFAULT_LENGTHS["cuda"])
    fitting = [length for length in lengths if context.limit is None or length <= context.limit]
    return [
        Cell("model", {"batch_size": 1}),
        *(Cell(f"prefill-{length}", {"length": length}) for length in fitting),
        *(Cell(f"decode-{size}", {"batch_size": size}) for size in settings.batch_sizes),
    ]


def score(context: Context, cell: Cell) -> list[Score]:
    kind = cell.name.partition("-")[0]
    return MEASURES[kind](context, cell)


def _size(context: Context, cell: Cell) -> list[Score]:
    reader = context.reader
    _, state = reader.read([[0]])
    counts = {
        "state_bytes": float(sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(state))),
        "parameters": float(sum(parameter.numel() for parameter in reader.model.parameters())),
    }
    return [Score(f"{cell.name}/0", cell.name, cell.slice, counts)]


def state_tensors(state: State) -> list[torch.Tensor]:
    """All tensors of a cache: recurrent and convolution states, and attention's keys and values."""
    import torch

    found: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    for layer in getattr(state.cache, "layers", [state.cache]):
        visit(vars(layer))
    return list(found.values())


def _random_ids(reader: Reader, rows: int, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, reader.vocab_size, (rows, length), generator=generator)


def _prefill(context: Context, cell: Cell) -> list[Score]:
    from statex.utils.timing import peak_memory, reset_peak_memory

    reader, length = context.reader, cell.slice["length"]
    ids = _random_ids(reader, 1, length).tolist()
    reset_peak_memory(reader.device)
    times = _times(context, lambda: reader.read(ids))
    peak = float(peak_memory(reader.device))
    scores = [{"prefill_tokens_per_second": length / seconds} for seconds in times]
    scores[0]["peak_memory"] = peak
    return [item_score(cell, number, values) for number, values in enumerate(scores)]


def _decode(context: Context, cell: Cell) -> list[Score]:
    from statex.models.captured_step import CapturedStep

    reader, size, count = context.reader, cell.slice["batch_size"], context.settings("cost").decode_tokens
    logits, state = reader.read(_random_ids(reader, size, READ_FIRST).tolist())
    states = iter([reader.copy_state(state) for _ in range(context.settings("cost").repetitions + 1)])
    times = {"decode_ms_per_token": _times(context, lambda: reader.generate(logits, next(states), count + 1))}
    if _can_be_captured(reader):
        step = CapturedStep(reader.model, state.cache, size)
        times["decode_graph_ms_per_token"] = _times(context, lambda: _replay(step, logits, count))
    return [
        item_score(cell, number, {name: 1e3 * taken[number] / count for name, taken in times.items()})
        for number in range(context.settings("cost").repetitions)
    ]


def _can_be_captured(reader: Reader) -> bool:
    from statex.families import FAMILIES

    model_type = getattr(reader.config, "base_model_type", reader.config.model_type)
    return reader.device.type == "cuda" and model_type in FAMILIES and not reader.has_attention


def _replay(step: CapturedStep, logits: torch.Tensor, count: int) -> None:
    """Decode greedily; the state is carried from one repetition to the next, which does not affect the time."""
    for _ in range(count):
        logits = step(logits.argmax(dim=-1))


def _times(context: Context, function: Callable[[], object]) -> list[float]:
    """Seconds of each repetition, after a warm-up."""
    from statex.utils.timing import Stopwatch

    function()
    times = []
    for _ in range(context.settings("cost").repetitions):
        watch = Stopwatch(context.reader.device)
        function()
        times.append(watch.seconds())
    return times


MEASURES: dict[str, Callable[[Context, Cell], list[Score]]] = {
    "model": _size, "prefill": _prefill, "decode": _decode
}  # fmt: skip

SUITE = Suite(
    name="cost",
    units={
        "state_bytes": "bytes",
        "parameters": "elements",
        "prefill_tokens_per_second": "tokens/s",
        "decode_ms_per_token": "ms",
        "decode_graph_ms_per_token": "ms",
        "peak_memory": "bytes",
    },
    groups=(("length",), ("batch_size",)),
    cells=cells,
    score=score,
    settings=CostSettings,
    check=check,
    paired=False,
)
