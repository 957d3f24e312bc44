"""Make our names known to transformers' Auto classes, each as late as it can be.

`import statex` costs nothing: configurations register when transformers' own table of configurations is there, at once
or as soon as it is imported; model classes register when one of those configurations is first built.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO_CONFIGURATIONS = "transformers.models.auto.configuration_auto"


def register_configurations() -> None:
    """Add statex_gla and statex_mamba2 to transformers' AutoConfig; no other name is touched."""
    from transformers import AutoConfig

    from statex.models.configuration_mamba2 import StatexMamba2Config
    from statex.models.gla.configuration import GLAConfig

    for config_class in (GLAConfig, StatexMamba2Config):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_models() -> None:
    """Add the model classes of those configurations to AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM

    from statex.models.configuration_mamba2 import StatexMamba2Config
    from statex.models.gla.configuration import GLAConfig
    from statex.models.gla.modeling import GLAForCausalLM
    from statex.models.mamba2 import StatexMamba2ForCausalLM

    AutoModelForCausalLM.register(GLAConfig, GLAForCausalLM, exist_ok=True)
    AutoModelForCausalLM.register(StatexMamba2Config, StatexMamba2ForCausalLM, exist_ok=True)


def register_with_transformers() -> None:
    """Register the configurations now if transformers' Auto classes are loaded, else right after they are."""
    if AUTO_CONFIGURATIONS in sys.modules:
        register_configurations()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


class _RegisterAfterImport:
    """An import finder that waits for transformers' table of configurations, registers ours, and is gone.

    Modules of transformers import one another in circles (a configuration's docstring is made from the table of
    models), and ours are imported by registering: so it waits until no module of either is half-way.
    """

    def __init__(self) -> None:
        self.half_way: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in ("transformers", "statex") or name in self.half_way:
            return None
        self.half_way.add(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            self.half_way.discard(name)
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            try:
                execute(module)
            finally:
                self.half_way.discard(name)
            if not self.half_way and AUTO_CONFIGURATIONS in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register_configurations()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
