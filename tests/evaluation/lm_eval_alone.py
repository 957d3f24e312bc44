"""lm-eval as its users start it: this module imports nothing of statex."""

import sys
from pathlib import Path


def main(command: list[str]) -> None:
    """`lm_eval ...` that indexes one folder of its own tasks; all of them take 15 s."""
    import lm_eval.tasks
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.tasks.manager import TaskIndex

    assert "statex" not in sys.modules
    sys.argv, own, files_of = command, Path(lm_eval.tasks.__file__).parent, TaskIndex._iter_yaml_files
    TaskIndex._iter_yaml_files = staticmethod(lambda root: files_of(root / "piqa" if root == own else root))
    cli_evaluate()
