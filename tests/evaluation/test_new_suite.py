"""A suite is one file and one line of the table: what CONTRIBUTING.md says is done, as written, and then everything
else knows the suite."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from tiny_models import make_gla

import statex
from commands import run_each
from tiny_recipe import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of statex with the suite that CONTRIBUTING.md adds."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(Path(statex.__file__).parent, folder / "statex")
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a suite")[2].partition("\n## ")[0]
    )
    code, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (folder / "statex" / "evaluation" / "suites" / "repetition.py").write_text(code)
    table = folder / "statex" / "results" / "suites.py"
    text = table.read_text(encoding="utf-8")
    begin = "SUITES: dict[str, SuiteEntry] = {\n"
    assert text.count(begin) == 1
    table.write_text(text.replace(begin, begin + line), encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_suite_is_one_file_and_one_line(package, tokenizer, source, tmp_path):
    """A run measures and reports it, and so do help and mistakes know it."""
    make_gla().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    values = {
        "name": "toy", "models": {"gla": {"checkpoint": "model"}}, "arms": {"base": {"kind": "base"}},
        "data": {"text": source.model_dump(exclude_none=True)},
        "training": {"sequence_length": 32, "tokens_per_step": 64, "steps": 2, "warmup_steps": 0},
        "evaluation": {"suites": ["repetition"], "repetition": {"lengths": [16], "num_items": 3}},
    }  # fmt: skip
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(values))
    run, help_text, refused = run_each(
        ["run", "recipe.toml", "--set", "evaluation.repetition.num_items=4"],
        ["eval", "--help"],
        ["eval", "nowhere", "--suite", "repetition", "--set", "evaluation.repetition.num_itmes=4"],
        cwd=tmp_path, path=[package], env=environment(COLUMNS="200"),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs/toy/results.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["suite"] == "repetition"]
    assert (row["slice"], row["n"], row["unit"]) == ({"length": 16}, 4, "fraction")
    assert "Repetition of random tokens" in (tmp_path / "runs/toy/report.md").read_text()
    assert "Repetition of random tokens" in (tmp_path / "runs/toy/report.html").read_text()
    assert (tmp_path / "runs/toy/gla/base-seed0/evaluation/items/repetition.jsonl").exists()
    assert "repetition, mqar, passkey" in help_text.stdout
    assert "evaluation.repetition.num_itmes" in refused.stderr


WITHOUT_TORCH = """
import sys
sys.orig_argv = [sys.executable, "-m", "statex"]  # as the command line: the package registers nothing
import statex.recipe
statex.recipe.load_recipe(sys.argv[1])
print({"torch", "transformers", "datasets", "scipy"} & set(sys.modules))
"""


def test_a_recipe_is_read_without_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "recipes" / "demo.toml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
