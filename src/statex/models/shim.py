"""The small module in a saved folder through which `trust_remote_code=True` finds our classes."""

import os
from pathlib import Path
from typing import Any

SHIM = "modeling_statex"


class SourcesStayHere:
    """Mixin of configuration and model classes; put it before the transformers classes."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Nothing: after it, transformers would save a copy of this package's sources instead of the shim."""


class FoundThroughShim(SourcesStayHere):
    """Mixin of configuration classes: wherever config.json is written, the shim that it names is written next to it."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As transformers', which a model calls before it uploads its folder, plus the shim."""
        classes = auto_classes(self.model_type)  # type: ignore[attr-defined]
        self.auto_map = {auto_class: f"{SHIM}.{ours.__name__}" for auto_class, ours in classes.items()}
        super().save_pretrained(save_directory)  # type: ignore[misc]
        write_shim(Path(save_directory), list(classes.values()))
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(repo_id, **kwargs)  # type: ignore[attr-defined]


def auto_classes(model_type: str) -> dict[str, Any]:
    """Our classes of a model type, by the Auto class that returns them."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return {
        "AutoConfig": config_class,
        "AutoModel": MODEL_MAPPING[config_class],
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING[config_class],
    }


def write_shim(folder: Path, classes: list[Any]) -> None:
    """Write the module that `auto_map` names."""
    names = ", ".join(f'"{one.__name__}"' for one in sorted(classes, key=lambda one: one.__name__))
    lines = [
        '"""Lets transformers load this folder with trust_remote_code=True; needs the package statex."""',
        "",
        *(f"from {one.__module__} import {one.__name__}" for one in classes),
        "",
        f"__all__ = [{names}]",
        "",
    ]
    (folder / f"{SHIM}.py").write_text("\n".join(lines), encoding="utf-8")
