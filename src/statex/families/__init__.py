"""The families of recurrent models that can be expanded, one file each."""

from typing import Any

import transformers

from statex.errors import UserError
from statex.families.bailing_hybrid import BailingHybridFamily
from statex.families.bamba import BambaFamily
from statex.families.base import Family, LayerShape, Segment, StateGeometry, TensorRows
from statex.families.falcon_h1 import FalconH1Family
from statex.families.falcon_mamba import FalconMambaFamily
from statex.families.fla_delta import DeltaNetFamily, GatedDeltaNetFamily
from statex.families.fla_gated import GLAOfFLAFamily, GSAFamily, HGRN2Family
from statex.families.fla_retnet import RetNetFamily
from statex.families.gla import GLAFamily
from statex.families.granitemoehybrid import GraniteMoeHybridFamily
from statex.families.jamba import JambaFamily
from statex.families.kimi_linear import KimiLinearFamily
from statex.families.mamba import MambaFamily
from statex.families.mamba2 import Mamba2Family
from statex.families.minimax import MiniMaxFamily
from statex.families.nemotron_h import NemotronHFamily
from statex.families.olmo_hybrid import OlmoHybridFamily
from statex.families.qwen3_5 import Qwen35Family
from statex.families.qwen3_next import Qwen3NextFamily
from statex.families.rwkv7 import RWKV7Family
from statex.families.xlstm import XLSTMFamily
from statex.families.zamba2 import Zamba2Family

ALL_FAMILIES: dict[str, Family] = {
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
        BailingHybridFamily(),
        MiniMaxFamily(),
        MambaFamily(),
        FalconMambaFamily(),
        JambaFamily(),
        RWKV7Family(),
        XLSTMFamily(),
        GLAOfFLAFamily(),
        GSAFamily(),
        HGRN2Family(),
        RetNetFamily(),
        DeltaNetFamily(),
        GatedDeltaNetFamily(),
    )
}
FAMILIES = {name: family for name, family in ALL_FAMILIES.items() if family.is_available}
"""Those whose classes are installed."""

OURS_ONLY = {"xlstm": "statex_xlstm", "rwkv7": "statex_rwkv7"}
"""Model types of transformers and flash-linear-attention that are families in a form of statex's own alone, which
`statex.load` makes of a folder."""

NOT_EXPANDABLE = {
    "recurrent_gemma": "its recurrence keeps one number a channel: there are no keys to add",
    "hgrn": "its recurrence keeps one number a channel: there are no keys to add",
    "rwkv": "RWKV-4 keeps two sums a channel: there are no keys to add",
    "lfm2": "its convolutions keep the last few inputs and have no recurrent state",
    "lfm2_moe": "its convolutions keep the last few inputs and have no recurrent state",
    "lfm3": "its convolutions keep the last few inputs and have no recurrent state",
}
"""Recurrent models, or such as are taken for them, whose state cannot be enlarged, and why not."""
OF_FLA = "it is flash-linear-attention's, of whose models statex expands those that are listed as families"
NOT_EXPANDABLE |= dict.fromkeys(("kda", "rwkv6", "lightnet", "gated_deltaproduct", "comba"), OF_FLA)


def family_of(config: Any) -> Family:
    """The family of a model's configuration, expanded or not.

    Raises:
        UserError: no known family.
    """
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type not in FAMILIES:
        raise unknown_family(model_type)
    family = FAMILIES[model_type]
    if family.library != "fla" and config.__module__.startswith("fla."):
        problem = "is here a model of flash-linear-attention's, not transformers' of that name, which statex expands"
        raise UserError("model_type", model_type, problem, "load the folder with statex.load")
    return family


def unknown_family(model_type: object) -> UserError:
    """The error that says why a model cannot be expanded and names the known families."""
    name = str(model_type)  # it may be anything yet
    missing = [family for key, family in ALL_FAMILIES.items() if key not in FAMILIES]
    library = next((one.library for one in missing if name in (one.model_type, one.expanded_type)), None)
    if library == "fla":
        problem = "is flash-linear-attention's, which is not installed"
        return UserError("model_type", model_type, problem, "install flash-linear-attention (docs/families.md)")
    if library is not None:
        problem = f"is not in transformers {transformers.__version__}, by which statex would read and expand it"
        return UserError("model_type", model_type, problem, "install a newer transformers (docs/families.md)")
    if name in OURS_ONLY:
        whose = "flash-linear-attention's" if name == "rwkv7" else "transformers'"
        problem = f"is {whose} own model, which takes no expanded state; statex's is {OURS_ONLY[name]}"
        return UserError("model_type", model_type, problem, "load its folder with statex.load")
    if (
        part := next((one.model_type for one in FAMILIES.values() if one.composite and one.composite == name), None)
    ) is not None:
        problem = f"is a model of text and images; its language model is of the family {part}"
        return UserError("model_type", model_type, problem, "load its folder with statex.load, which takes that alone")
    problem, known = "is not a family that statex can expand", f"known families: {', '.join(FAMILIES)}"
    if (reason := NOT_EXPANDABLE.get(name)) is not None:
        problem = f"{problem}: {reason}"
    else:
        known = f"{known}; a model of attention alone has no recurrent state to enlarge"
    return UserError("model_type", model_type, problem, known)


__all__ = [
    "ALL_FAMILIES",
    "FAMILIES",
    "NOT_EXPANDABLE",
    "Family",
    "LayerShape",
    "Segment",
    "StateGeometry",
    "TensorRows",
    "family_of",
    "unknown_family",
]
