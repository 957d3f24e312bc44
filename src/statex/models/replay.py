"""What a model class needs to carry its expansion: the plan of config.json replayed when the model is built."""

import os
from pathlib import Path
from typing import Any

from statex.expansion.plan import stored_plan
from statex.expansion.surgery import replay_plan

SHIM = "modeling_statex"


class ReplayExpansion:
    """Mixin of model classes whose configuration may hold a plan; put it before the transformers classes."""

    config: Any

    def replay_expansion(self) -> None:
        """Give the layers of a stored plan their expanded shapes; to be called in `__init__`, before `post_init`."""
        plan = stored_plan(self.config)
        if plan is not None and plan.kind == "expand":
            replay_plan(self, plan)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', plus a small module through which `trust_remote_code=True` finds the classes."""
        config_class, model_class = type(self.config), type(self)
        self.config.auto_map = {
            "AutoConfig": f"{SHIM}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{SHIM}.{model_class.__name__}",
        }
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        lines = [
            '"""Lets transformers load this folder with trust_remote_code=True; needs the package statex."""',
            "",
            f"from {config_class.__module__} import {config_class.__name__}",
            f"from {model_class.__module__} import {model_class.__name__}",
            "",
            f'__all__ = ["{config_class.__name__}", "{model_class.__name__}"]',
            "",
        ]
        (Path(save_directory) / f"{SHIM}.py").write_text("\n".join(lines), encoding="utf-8")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Nothing: saving must write the shim above, not a copy of this package's sources."""
