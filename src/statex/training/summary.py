"""What a stage of training cost and showed, as `training.json` has it."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainingSummary:
    """What a stage of training cost, over the steps since it was last started."""

    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory: int
    final_loss: float | None
    num_processes: int
    data_wait: float = 0.0
    """Share of the time that the first rank waited for batches."""
    skipped_steps: int = 0
    """Of the whole stage, by `training.bad_steps`."""
    state_use: list[dict[str, float]] = field(default_factory=list)
    """Of the whole stage, by `training.watch_state_every`: the steps done, and what `WatchState` found then."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return asdict(self)
