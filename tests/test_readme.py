"""Every statex command and the Python of the README run, on a demo cut to a few steps."""

import re
import shlex
import sysconfig
from pathlib import Path

import pytest

from commands import run, run_each
from tiny_recipe import environment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAININGS = ("models.gla.pretraining", "models.mamba2.pretraining", "training")
SMALL = (
    *(f"{section}.{key}" for section in TRAININGS for key in ("steps=8", "warmup_steps=2", "tokens_per_step=256")),
    "workers=1", 'arms.reinit.models=["mamba2"]', 'arms.control.models=["gla"]',
    "evaluation.mqar.num_items=4", "evaluation.mqar.num_pairs=[4]", "evaluation.passkey.num_items=2",
    "evaluation.passkey.lengths=[128]", "evaluation.ar_hits.num_windows=4", "evaluation.ar_hits.length=128",
    "evaluation.nll_by_position.length=128",
    "evaluation.ar_hits.count_tokens=20000", "evaluation.nll_by_position.num_windows=4",
    "data.text.standard_library=false", f'data.text.files=["{sysconfig.get_path("stdlib")}/[a-c]*.py"]',
)  # fmt: skip


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def statex_commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in code_blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("statex ")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the demo recipe, a few steps long, in which the README's commands were followed."""
    folder = tmp_path_factory.mktemp("readme")
    overrides = [part for change in SMALL for part in ("--set", change)]
    commands = [shlex.split(command)[1:] for command in statex_commands()]
    assert len(commands) >= 4
    run = ["run", ROOT / "recipes" / "demo.toml", *overrides]
    for done in run_each(run, *commands, cwd=folder, env=environment()):
        assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
        assert done.stdout
        assert done.args[0] != "run" or "text NLL" in done.stdout
    return folder


@pytest.mark.slow
def test_commands_and_python(demo: Path) -> None:
    (block,) = code_blocks("python")
    done = run(exec, block, {"__name__": "__main__"}, cwd=demo, env=environment())
    assert done.returncode == 0, done.stderr
    assert "new rows" in done.stdout
    assert "state +300%" in done.stdout


def test_make_targets_exist() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(code_blocks("bash")), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", targets, flags=re.MULTILINE)
