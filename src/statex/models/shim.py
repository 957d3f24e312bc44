"""The small module in a saved folder through which `trust_remote_code=True` finds our classes."""

from pathlib import Path

SHIM = "modeling_statex"


class FoundThroughShim:
    """Mixin of configuration and model classes; put it before the transformers classes."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Nothing: after it, transformers would save a copy of this package's sources instead of the shim."""


def auto_map(config_class: type, model_class: type) -> dict[str, str]:
    """The entry of config.json that leads to the shim."""
    return {
        "AutoConfig": f"{SHIM}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{SHIM}.{model_class.__name__}",
    }


def write_shim(folder: Path, config_class: type, model_class: type) -> None:
    """Write the module that `auto_map` names."""
    lines = [
        '"""Lets transformers load this folder with trust_remote_code=True; needs the package statex."""',
        "",
        f"from {config_class.__module__} import {config_class.__name__}",
        f"from {model_class.__module__} import {model_class.__name__}",
        "",
        f'__all__ = ["{config_class.__name__}", "{model_class.__name__}"]',
        "",
    ]
    (folder / f"{SHIM}.py").write_text("\n".join(lines), encoding="utf-8")
