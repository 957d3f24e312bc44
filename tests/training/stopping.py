"""`statex ...` whose training of a Mamba2 is stopped, as by the keyboard, when it has done four steps."""

from statex.cli import main as statex
from statex.training.trainer import StatexTrainer

original = StatexTrainer.training_step


def training_step(self, *args, **kwargs):
    if "mamba2" in self.model.config.model_type and self.state.global_step == 4:
        raise KeyboardInterrupt
    return original(self, *args, **kwargs)


def main() -> None:
    StatexTrainer.training_step = training_step
    statex()


if __name__ == "__main__":
    main()
