"""What --help and a mistyped command print, and how soon."""

import subprocess
import sys

import pytest

from tiny_recipe import environment

VERBS = ["inspect", "expand", "train", "eval", "bench", "report", "run"]


def test_help_comes_at_once():
    """Without torch or transformers, which take seconds; counted in the processor's time, whatever else runs."""
    script = (
        "import sys, sysconfig, time\n"
        "sys.argv = [sysconfig.get_path('scripts') + '/statex', '--help']\n"
        "from statex.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "    print(end.code, round(time.process_time(), 2), *heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    status, seconds, *heavy = done.stderr.split()
    assert (status, heavy) == ("0", [])
    assert float(seconds) < 1
    assert all(verb in done.stdout for verb in VERBS)
    assert "statex run recipes/demo.toml" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(call, verb):
    status, output, _ = call(verb, "--help")
    assert status == 0
    assert f"Example: statex {verb}" in " ".join(output.replace("│", " ").split())


def test_nothing_asked_is_help(call):
    status, output, errors = call()
    assert status in (0, 2)  # 2 with newer versions of click
    assert "statex inspect MODEL" in output + errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-verb"], ["inspect"], ["expand", "only-one"], ["expand", "a", "b", "--every", "two"],
        ["expand", "a", "b", "--init", "zero"], ["train", "r.toml", "--no-such-option"], ["bench", "everything"],
    ],
)  # fmt: skip
def test_what_typer_refuses_is_the_user_s_mistake(call, arguments):
    status, output, errors = call(*arguments)
    assert (status, output) == (2, "")
    assert "Usage: statex" in errors
