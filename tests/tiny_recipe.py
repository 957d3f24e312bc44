"""Recipes that run in seconds: sources of the standard library as text, two tiny models, every kind of arm."""

import os
import subprocess
import sys
import sysconfig
from copy import deepcopy
from pathlib import Path
from typing import Any

import tomli_w

TEXT_MODULES = (
    "textwrap", "bisect", "heapq", "fnmatch", "shlex", "sched", "queue", "reprlib", "keyword", "opcode", "stat",
    "string", "glob", "calendar", "colorsys",
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "statex_gla": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 16, "use_short_conv": True,
        "tie_word_embeddings": True,
    },
    "mamba2": {
        "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 2,
        "tie_word_embeddings": True, "residual_in_fp32": False,
    },
}  # fmt: skip

_ATTENTION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16,
}  # fmt: skip
MAMBAS: dict[str, dict[str, Any]] = {  # of the first Mamba
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "residual_in_fp32": False},
    "jamba": _ATTENTION | {
        "mamba_d_state": 8, "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 1,
    },
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {  # whose second layer is recurrent
    "bamba": _ATTENTION | {
        "attn_layer_indices": [0], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
        "mamba_expand": 2, "mamba_chunk_size": 16,
    },
    "olmo_hybrid": _ATTENTION | {
        "layer_types": ["full_attention", "linear_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip

DATA = {
    "text": {"held_out": 0.3},
    "tokenizer": {"vocab_size": 300, "training_bytes": 20_000},
    "recall": {"num_keys": 8, "num_values": 8, "shapes": [[16, 4]]},
}

TRAINING = {
    "steps": 4, "tokens_per_step": 128, "sequence_length": 32, "weights": {"text": 0.5, "mqar": 0.5},
    "learning_rate": 1e-2, "warmup_steps": 1, "save_every": 2, "log_every": 1,
}  # fmt: skip

EVALUATION = {
    "suites": ["mqar", "nll_by_position"],
    "mqar": {"num_pairs": [2, 4], "num_keys": 8, "num_values": 8, "num_items": 8},
    "nll_by_position": {"length": 32, "num_windows": 8},
}

ARMS: dict[str, dict[str, Any]] = {
    "lpt": {"kind": "lpt"},
    "reinit": {"kind": "statex", "expansion": {"every": 1, "init": "reinit"}},
    "preserve": {"kind": "statex", "expansion": {"every": 1, "init": "preserve"}},
    "control": {"kind": "control", "expansion": {"every": 1}},
}


def write_text(folder: Path) -> str:
    """Copy some sources of the standard library to `folder`, one document each; returns their glob."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(sysconfig.get_path("stdlib"))
    for name in TEXT_MODULES:
        (folder / f"{name}.txt").write_text((library / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return str(folder / "*.txt")


def data_values(text: str) -> dict[str, Any]:
    """A recipe's data section over the files that the glob `text` matches."""
    values: dict[str, Any] = deepcopy(DATA)
    values["text"]["files"] = [text]
    return values


def recipe_values(text: str, output: Path, families: list[str] | None = None) -> dict[str, Any]:
    """A recipe that pre-trains a tiny model of each family and compares all kinds of arms, in plain values."""
    models = {
        family.removeprefix("statex_"): {"family": family, "config": CONFIGS[family], "pretraining": deepcopy(TRAINING)}
        for family in families or list(CONFIGS)
    }
    values = {
        "name": "tiny", "output": str(output), "models": models, "arms": ARMS, "training": TRAINING,
        "data": data_values(text), "evaluation": EVALUATION,
    }  # fmt: skip
    return deepcopy(values)


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Write a recipe's values as TOML."""
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


def changed(values: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """A copy of a recipe's values with `section.key=value` overrides."""
    from statex.recipe import apply_override

    values = deepcopy(values)
    for override in overrides:
        apply_override(values, override)
    return values


def times(folder: Path) -> dict[str, int]:
    """When each file in a folder was last written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess: one thread, no hub."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | changes


def run_statex(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run `python -m statex ...` and wait for it."""
    command = [sys.executable, "-m", "statex", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment())
