"""As `python -m statex`, but the second rank is killed (SIGKILL) as it begins its third step."""

import os
import signal

from statex.cli import main
from statex.training.trainer import StatexTrainer

original = StatexTrainer.training_step


def training_step(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)


if __name__ == "__main__":
    StatexTrainer.training_step = training_step
    main()
