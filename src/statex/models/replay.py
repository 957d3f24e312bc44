"""What a model class needs to carry its expansion: the plan of config.json replayed when the model is built."""

from typing import Any

from statex.expansion.surgery import replay_plan
from statex.models.shim import SourcesStayHere


class ReplayExpansion(SourcesStayHere):
    """Mixin of model classes whose configuration may hold a plan; put it before the transformers classes."""

    config: Any

    def replay_expansion(self) -> None:
        """Give the layers of a stored plan their expanded shapes; to be called in `__init__`, before `post_init`."""
        if self.config.expansion is not None:
            replay_plan(self)

    def exchange_classes(self) -> None:
        """Make mixers that have just been inserted compute as the others do; a no-op where all are of one class."""
