"""What a model class needs to carry its expansion: the plan of config.json replayed when the model is built."""

import os
from pathlib import Path
from typing import Any

from statex.expansion.plan import stored_plan
from statex.expansion.surgery import replay_plan
from statex.models.shim import FoundThroughShim, auto_map, write_shim


class ReplayExpansion(FoundThroughShim):
    """Mixin of model classes whose configuration may hold a plan; put it before the transformers classes."""

    config: Any

    def replay_expansion(self) -> None:
        """Give the layers of a stored plan their expanded shapes; to be called in `__init__`, before `post_init`."""
        plan = stored_plan(self.config)
        if plan is not None and plan.kind == "expand":
            replay_plan(self, plan)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', plus the shim for `trust_remote_code=True`."""
        classes = type(self.config), type(self)
        self.config.auto_map = auto_map(*classes)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_shim(Path(save_directory), *classes)
