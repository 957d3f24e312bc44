"""Commands of statex in processes of their own that are forked, for importing takes longer than most: `commands.py
COMMANDS`, a list of lists of arguments as JSON. Prints what became of each, up to the first that fails."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_each(*commands: Sequence[str | Path], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """`statex ...` for each of the commands in turn; `options` are those of subprocess.run."""
    script = [sys.executable, __file__, json.dumps([[str(part) for part in command] for command in commands])]
    done = subprocess.run(script, capture_output=True, text=True, check=True, **options)
    return [subprocess.CompletedProcess(*result) for result in json.loads(done.stdout)]


def _run(command: list[str]) -> tuple[list[str], int, str, str]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = ["statex", *command]
            main()
            sys.exit()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return command, status, *texts


if __name__ == "__main__":
    gc.disable()
    import datasets  # noqa: F401  what most commands import, imported once

    import statex.evaluation.runner
    import statex.training.trainer  # noqa: F401
    from statex.cli import main

    gc.freeze()
    gc.enable()
    results = []
    for each in json.loads(sys.argv[1]):
        results.append(_run(each))
        if results[-1][1]:
            break
    print(json.dumps(results))
