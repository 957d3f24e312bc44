"""statex: enlarge the recurrent state of a pre-trained language model, post-train it, measure what it gained and cost.

Importing it has the families' names registered with transformers once its Auto classes are used, and does nothing else;
everything below is imported when it is first used.
"""

import importlib
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from statex.models.registration import register_when_needed
from statex.utils.environment import warn_untested

if TYPE_CHECKING:
    from statex.checkpoint import export_fla, inspect, load
    from statex.errors import UserError
    from statex.expansion.config import PRESETS, ExpansionConfig
    from statex.expansion.edits import ExpansionPlan
    from statex.expansion.plan import plan_expansion
    from statex.expansion.state import state_report
    from statex.families import FAMILIES
    from statex.models.dispatch import statex_ops
    from statex.models.expanded import expand, reinitialize

_HOMES = {
    "ExpansionConfig": "statex.expansion.config",
    "ExpansionPlan": "statex.expansion.edits",
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


def _is_command_line() -> bool:
    """Whether this is our own command: its `--help` must not wait for transformers, and its verbs register families.

    A program of the user's may be called statex too, so the installed script must be this environment's.
    """
    program = Path((sys.argv or [""])[0])
    installed = program.stem == "statex" and program.parent == Path(sysconfig.get_path("scripts"))
    return installed or sys.orig_argv[1:3] == ["-m", "statex"]


if not _is_command_line():
    warn_untested()
    register_when_needed()
