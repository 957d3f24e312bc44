"""`statex ...` whose second rank is killed (SIGKILL) as it begins its third step, and says so."""

import os
import signal
import sys

from statex.cli import main as statex
from statex.training.trainer import StatexTrainer

MESSAGE = "the second rank is killed"
original = StatexTrainer.training_step


def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        print(MESSAGE, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)


def main() -> None:
    StatexTrainer.training_step = training_step
    statex()
