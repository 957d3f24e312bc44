"""Arguments of commands, and what a command left."""

from pathlib import Path


def nothing_new(folder: Path, *known: str) -> bool:
    return {path.name for path in folder.iterdir()} <= set(known)


SMALL_MQAR = [
    f"evaluation.mqar.{setting}" for setting in ("num_pairs=[2,4]", "num_keys=8", "num_values=8", "num_items=4")
]


def eval_arguments(model: Path, out: Path, *overrides: str) -> list[str | Path]:
    settings = [part for override in (*SMALL_MQAR, *overrides) for part in ("--set", override)]
    return ["eval", model, "--suite", "mqar", "--out", out, *settings]
