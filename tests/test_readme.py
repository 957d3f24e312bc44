"""Every statex command and the Python of the README run, on a demo cut to a few steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAININGS = ("models.gla.pretraining", "models.mamba2.pretraining", "training")
SMALL = (
    *(f"{section}.{key}" for section in TRAININGS for key in ("steps=8", "warmup_steps=2", "tokens_per_step=256")),
    "workers=1", "evaluation.mqar.num_items=4", "evaluation.passkey.num_items=2", "evaluation.ar_hits.num_windows=4",
    "evaluation.ar_hits.count_tokens=20000", "evaluation.nll_by_position.num_windows=4",
)  # fmt: skip


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def statex_commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in code_blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("statex ")]


def execute(command: list[str], folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/demo` is a finished run of the demo recipe, a few steps long."""
    folder = tmp_path_factory.mktemp("readme")
    overrides = [part for change in SMALL for part in ("--set", change)]
    out = execute([sys.executable, "-m", "statex", "run", str(ROOT / "recipes" / "demo.toml"), *overrides], folder)
    assert "text NLL" in out
    return folder


@pytest.mark.slow
def test_commands(demo: Path) -> None:
    commands = statex_commands()
    assert len(commands) >= 4
    for command in commands:
        assert execute([sys.executable, "-m", *shlex.split(command)], demo)


@pytest.mark.slow
def test_python(demo: Path) -> None:
    (block,) = code_blocks("python")
    out = execute([sys.executable, "-c", block], demo)
    assert "new rows" in out
    assert "state +300%" in out


def test_make_targets_exist() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(code_blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", targets, flags=re.MULTILINE)
