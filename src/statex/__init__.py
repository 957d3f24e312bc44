"""statex: enlarge the recurrent state of a pre-trained language model, post-train it, measure what it gained and cost.

Importing it registers the configurations `statex_gla` and `statex_mamba2` with transformers (now, or when transformers
is imported) and does nothing else; everything below is imported when it is first used.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from statex.checkpoint import export_fla, inspect, load
    from statex.errors import UserError
    from statex.expansion.config import PRESETS, ExpansionConfig
    from statex.expansion.plan import ExpansionPlan, plan_expansion
    from statex.expansion.state import state_report
    from statex.families import FAMILIES
    from statex.models.dispatch import statex_ops
    from statex.models.expanded import expand, reinitialize

_HOMES = {
    "ExpansionConfig": "statex.expansion.config",
    "ExpansionPlan": "statex.expansion.plan",
    "FAMILIES": "statex.families",
    "PRESETS": "statex.expansion.config",
    "UserError": "statex.errors",
    "expand": "statex.models.expanded",
    "export_fla": "statex.checkpoint",
    "inspect": "statex.checkpoint",
    "load": "statex.checkpoint",
    "plan_expansion": "statex.expansion.plan",
    "reinitialize": "statex.models.expanded",
    "state_report": "statex.expansion.state",
    "statex_ops": "statex.models.dispatch",
}

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "PRESETS",
    "ExpansionConfig",
    "ExpansionPlan",
    "UserError",
    "expand",
    "export_fla",
    "inspect",
    "load",
    "plan_expansion",
    "reinitialize",
    "state_report",
    "statex_ops",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'statex' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_TABLE = "transformers.models.auto.configuration_auto"


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Registers our configurations as soon as transformers' table of them is imported, by whatever program.

    So `import statex` does not wait for transformers. Ours import modules of transformers in their turn; therefore they
    are registered when the outermost import of transformers ends.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("transformers."):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path and _TABLE in sys.modules and not _half_imported(but=module):
                    sys.meta_path.remove(self)
                    _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _half_imported(but: ModuleType | None = None) -> bool:
    """Whether any module of transformers, `but` this one, is being imported."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers.")]
    specs = [getattr(module, "__spec__", None) for module in modules if module is not but]
    return any(getattr(spec, "_initializing", False) for spec in specs)


def _register() -> None:
    from statex.models.registration import register_configurations

    register_configurations()


if _TABLE in sys.modules and not _half_imported():
    _register()
else:
    sys.meta_path.insert(0, _AfterTransformers())
