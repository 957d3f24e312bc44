"""The families of recurrent models that can be expanded, one file each."""

from typing import Any

from statex.errors import UserError
from statex.families.bamba import BambaFamily
from statex.families.base import Family, LayerShape, Segment, StateGeometry, TensorRows
from statex.families.falcon_h1 import FalconH1Family
from statex.families.falcon_mamba import FalconMambaFamily
from statex.families.gla import GLAFamily
from statex.families.granitemoehybrid import GraniteMoeHybridFamily
from statex.families.jamba import JambaFamily
from statex.families.kimi_linear import KimiLinearFamily
from statex.families.mamba import MambaFamily
from statex.families.mamba2 import Mamba2Family
from statex.families.nemotron_h import NemotronHFamily
from statex.families.olmo_hybrid import OlmoHybridFamily
from statex.families.qwen3_5 import Qwen35Family
from statex.families.qwen3_next import Qwen3NextFamily
from statex.families.zamba2 import Zamba2Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GLAFamily(),
        Mamba2Family(),
        BambaFamily(),
        GraniteMoeHybridFamily(),
        Zamba2Family(),
        NemotronHFamily(),
        FalconH1Family(),
        Qwen3NextFamily(),
        Qwen35Family(),
        OlmoHybridFamily(),
        KimiLinearFamily(),
        MambaFamily(),
        FalconMambaFamily(),
        JambaFamily(),
    )
}


def family_of(config: Any) -> Family:
    """The family of a model's configuration, expanded or not.

    Raises:
        UserError: no known family.
    """
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type not in FAMILIES:
        raise unknown_family(model_type)
    return FAMILIES[model_type]


def unknown_family(model_type: object) -> UserError:
    """The error that names the known families."""
    known = f"known families: {', '.join(FAMILIES)}"
    return UserError("model_type", model_type, "is no family that statex can expand", known)


__all__ = [
    "FAMILIES",
    "Family",
    "LayerShape",
    "Segment",
    "StateGeometry",
    "TensorRows",
    "family_of",
    "unknown_family",
]
