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
AUTO_MODELS = "transformers.models.auto.modeling_auto"


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
    """An import finder that waits for transformers' Auto modules, registers our configurations, and is gone.

    Either module may be imported first, and each imports the other on its way (a configuration's docstring is made
    from the table of models), so registration waits until neither is half-way.
    """

    def __init__(self) -> None:
        self.loading: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in (AUTO_CONFIGURATIONS, AUTO_MODELS) or name in self.loading:
            return None
        self.loading.add(name)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            self.loading.discard(name)
            if not self.loading and self in sys.meta_path:
                sys.meta_path.remove(self)
                register_configurations()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
