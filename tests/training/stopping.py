"""As `python -m statex`, but training of a Mamba2 is stopped, as by the keyboard, when it has done four steps."""

from statex.cli import main
from statex.training.trainer import StatexTrainer

original = StatexTrainer.training_step


def training_step(self, *args, **kwargs):
    if "mamba2" in self.model.config.model_type and self.state.global_step == 4:
        raise KeyboardInterrupt
    return original(self, *args, **kwargs)


if __name__ == "__main__":
    StatexTrainer.training_step = training_step
    main()
