"""Functions, and commands of statex, in processes of their own: forked from one that has imported what takes seconds,
torch and transformers, but nothing of statex."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEAVY = [
    "datasets", "peft", "pydantic", "pytest", "scipy.optimize", "scipy.stats", "torch.distributed.launcher.api",
    "torch.distributed.tensor", "transformers.trainer", "typer",
]  # fmt: skip
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(HEAVY)


def run(
    function: Callable[..., object],
    *arguments: Any,
    env: Mapping[str, str] = os.environ,
    cwd: str | Path = ".",
    path: Sequence[str | Path] = (),
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Call a function of a module in a process of its own and wait for it, as subprocess.run does with a command; in
    the folders of `path` it finds modules before those that are installed."""
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("output", "errors")]
        process = FORKED.Process(target=_begin, args=(streams, dict(env), cwd, path, function, arguments))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(function.__name__, timeout)
        return subprocess.CompletedProcess(function, process.exitcode, *(path.read_text() for path in streams))


def run_each(*commands: Sequence[str | Path], **options: Any) -> list[subprocess.CompletedProcess[str]]:
    """`statex ...` for each of the commands in turn, up to the first that fails; `options` are those of `run`."""
    done = run(_each, [[str(part) for part in command] for command in commands], **options)
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(*result) for result in json.loads(done.stdout)]


def run_ranks(main: Callable[[], object], *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Call `main` for a command with these arguments in two processes, as torchrun does, whose agent starts and watches
    them; `options` are those of `run`."""
    return run(_launch, main, ["statex", *map(str, arguments)], **options)


def import_statex() -> None:
    """Import what most commands do, once for all processes that this one will fork."""
    import statex.cli
    import statex.evaluation.runner
    import statex.training.trainer  # noqa: F401
    from statex.models.dispatch import statex_ops

    with statex_ops():  # the models of transformers that run on them
        gc.freeze()


def statex() -> None:
    """`statex ...`, as sys.argv says."""
    from statex.cli import main

    main()


def _begin(
    streams: list[Path],
    env: dict[str, str],
    cwd: str | Path,
    path: Sequence[str | Path],
    function: Callable[..., object],
    arguments: tuple,
) -> None:
    gc.freeze()  # each training collects garbage, of which there is none in what was imported
    for number, stream in enumerate(streams, start=1):
        with stream.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = map(str, path)
    os.chdir(cwd)
    function(*arguments)


def _each(commands: list[list[str]]) -> None:
    import_statex()
    results = []
    for command in commands:
        results.append(_run(command))
        if results[-1][1]:
            break
    print(json.dumps(results))


def _run(command: list[str]) -> tuple[list[str], int, str, str]:
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv = ["statex", *command]
            statex()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return command, status, *texts


def _launch(main: Callable[[], object], command: list[str]) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    import_statex()
    sys.argv = command
    config = LaunchConfig(
        1, 1, nproc_per_node=2, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="fork",
    )  # fmt: skip
    elastic_launch(config, main)()
