"""Run transformers' recurrent models on statex's ops: the functions and norms that their modules call, on ours.

Shape letters: B batch, T time, H heads, P head dim, N state size, G groups, D channels, W taps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers

from statex.errors import UserError
from statex.families import FAMILIES
from statex.models.delta_rule import GATED_DELTA, KIMI_DELTA, NO_PACKED_CACHE, gated_norm_forward, with_query_channels
from statex.models.documents import has_attention, knowing_no_attention
from statex.models.fla import delta_rule_mixer
from statex.models.lightning import lightning_attention
from statex.models.padding import padding_stays_zero, zero_padding
from statex.models.selective_scan import selective_scan_mixer, with_documents
from statex.ops import gated_rms_norm, short_convolution, short_convolution_step, ssd, ssd_step
from statex.ops.segments import cu_seqlens_of

EARLIER_NAMES = {"NemotronHRMSNormGated": "Zamba2RMSNormGated"}


def mamba2_chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 0,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    seq_idx: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """transformers' function of that name: hidden_states [B,T,H,P], dt [B,T,H], A [H], B and C [B,T,G,N].

    Returns the output [B,T,H,P], with the final state [B,H,P,N] where asked. `seq_idx` [B,T] starts a fresh state at
    each document; `cu_seqlens`, what `cu_seqlens_of` makes of it, saves computing the borders again. `chunk_size` is
    the caller's hint, which ours does not need.

    Raises:
        ValueError: packed documents with a cache.
    """
    if seq_idx is not None and (return_final_states or initial_states is not None):
        raise ValueError(NO_PACKED_CACHE)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    if seq_idx is None:
        output, state = ssd(
            hidden_states, dt, A, B, C, D=D, initial_state=initial_states, output_final_state=return_final_states
        )
        return (output, state) if return_final_states else output
    x, dt, B, C = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (hidden_states, dt, B, C))
    output, _ = ssd(x, dt, A, B, C, D=D, cu_seqlens=cu_seqlens_of(seq_idx) if cu_seqlens is None else cu_seqlens)
    return output.view_as(hidden_states)


def mamba2_selective_state_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' function of that name, one token: state [B,H,P,N] in place, hidden_states and dt [B,H,P].

    dt, A [H,P,N], D and dt_bias [H,P] are broadcast by the caller along P and N; ours takes one number per head.
    """
    dt, bias = dt[..., 0], dt_bias[..., 0] if dt_bias is not None else None
    if not (dt_softplus and bias is not None):  # else the step does both
        dt = dt.float() if bias is None else dt.float() + bias.float()
        dt, bias = F.softplus(dt) if dt_softplus else dt, None
    skip = D[..., 0] if D is not None else None
    output = ssd_step(hidden_states, dt, A[:, 0, 0], B, C, state, D=skip, dt_bias=bias)
    return output if z is None else output * F.silu(z)


def causal_conv1d_fn(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' function of that name: hidden_states [B,D,T], weight [D,W]."""
    _require_silu(activation)
    if seq_idx is not None and seq_idx.shape[1] != hidden_states.shape[2]:  # a cache has put earlier inputs in front
        raise ValueError(NO_PACKED_CACHE)
    return short_convolution(hidden_states.mT, weight, bias, seq_idx=seq_idx).mT


def causal_conv1d_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' function of that name, one token: hidden_states [B,D,1], conv_state [B,D,W] in place."""
    _require_silu(activation)
    return short_convolution_step(hidden_states[..., 0], conv_state, weight, bias)[..., None]


def mamba2_split_conv1d_scan_combined(*args: Any, **kwargs: Any) -> None:
    """transformers' function of that name: None, so that the mixer takes the functions above one by one."""


def norm_forward(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """The forward of transformers' norms of these models, gated or not: both [..., D], the weight [D]."""
    group_size = getattr(self, "group_size", None)
    if hasattr(self, "n_groups"):  # Falcon-H1's
        group_size = self.weight.shape[0] // self.n_groups
    gate_first = not getattr(self, "norm_before_gate", False)
    output = gated_rms_norm(
        hidden_states, self.weight, gate, eps=self.variance_epsilon, group_size=group_size, gate_first=gate_first
    )
    return output.to(torch.promote_types(output.dtype, self.weight.dtype))


def _require_silu(activation: str | None) -> None:
    if activation not in ("silu", "swish"):
        raise ValueError(
            f"hidden_act = {activation!r}: statex's short convolution has SiLU only; use transformers' own."
        )


CONVOLUTION: dict[str, Callable] = {
    function.__name__: function for function in (causal_conv1d_fn, causal_conv1d_update)
}
REPLACEMENTS = CONVOLUTION | {
    function.__name__: function
    for function in (mamba2_chunk_scan, mamba2_selective_state_update, mamba2_split_conv1d_scan_combined)
}


class Recurrence(NamedTuple):
    """What statex's ops replace in transformers' modules whose mixers are of one kind."""

    functions: dict[str, Callable]
    """Of the module, by name."""
    norm_forward: Callable
    """Of the norms."""
    around_mixer: Callable[[Callable], Callable]
    """What a mixer's forward gets besides, or what takes its place where it calls no functions for its recurrence."""
    cache: str = ""
    """Full name of the cache that takes the place of transformers' own, which it is derived from; empty: none does."""
    around_model: Callable[[Callable], Callable] | None = None
    """What a base model's forward gets besides, where transformers' hands no borders of documents on to its mixers."""


RECURRENCES = {
    "mamba2": Recurrence(REPLACEMENTS, norm_forward, padding_stays_zero),
    "gated_delta": Recurrence(CONVOLUTION | GATED_DELTA, gated_norm_forward, with_query_channels),
    "kimi_delta": Recurrence(CONVOLUTION | KIMI_DELTA, gated_norm_forward, with_query_channels),
    "selective_scan": Recurrence({}, norm_forward, selective_scan_mixer, around_model=with_documents),
    "lightning": Recurrence(
        {},
        norm_forward,
        lightning_attention,
        cache="statex.models.lightning_cache.LightningCache",
    ),
    "fla_delta": Recurrence({}, norm_forward, delta_rule_mixer),
}
"""By the name that families use for them."""
ONLY_DISPATCHED: dict[str, tuple[str, tuple[str, ...]]] = {
    "qwen3_5_moe": ("gated_delta", ("Qwen3_5MoeRMSNormGated",)),
    "lara_mini": ("gated_delta", ()),
    "qwen4_exp": ("gated_delta", ()),
    "glm5_next": ("kimi_delta", ()),
}
"""Models of transformers (some only in newer versions) that are not families of statex: their recurrence, and those of
their norms that ours can replace."""


@contextmanager
def statex_ops() -> Iterator[None]:
    """Inside this context, every transformers model with one of RECURRENCES runs on statex's ops, whatever its device.

    It is reversible.

    Training with gradient checkpointing must run its backward pass inside it, too. Packed documents: give `seq_idx`
    to the base model (`model.backbone`), for transformers' `Mamba2ForCausalLM` drops it.

    Raises:
        UserError: the installed transformers has another name for something that is replaced.
    """
    replacements = [each for module, how in replaced_modules().items() for each in _replacements(module, *how)]
    replaced = []
    try:
        for owner, name, function in replacements:
            replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, function)
        with zero_padding():
            yield
    finally:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)


def replaced_modules() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The modules of transformers in which something is replaced, by full name: the recurrence of their mixers, and the
    norms in them that are replaced.

    These belong to the families that run on statex's ops, and to the models that are not families.
    """
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for family in FAMILIES.values():
        if family.mixer_class and family.library == "transformers":
            norms = tuple(norm.rpartition(".")[2] for norm in family.norm_classes)
            found[family.mixer_class.rpartition(".")[0]] = family.recurrence, norms
    for model, replaced in ONLY_DISPATCHED.items():
        if find_spec(f"transformers.models.{model}") is not None:
            found[f"transformers.models.{model}.modeling_{model}"] = replaced
    return found


def _replacements(path: str, recurrence: str, norms: tuple[str, ...]) -> Iterator[tuple[Any, str, Any]]:
    """What is replaced of a module of transformers: owner, name, and by what. It is loaded if it was not."""
    module = import_module(path)
    for name, function in RECURRENCES[recurrence].functions.items():
        find_member(module, name)
        yield module, name, function
    for name in norms:
        yield find_member(module, name), "forward", RECURRENCES[recurrence].norm_forward
    for family in (family for family in FAMILIES.values() if family.mixer_class.rpartition(".")[0] == path):
        if recurrence != "mamba2":  # whose mixers `zero_padding` sees to
            mixer = imported(family.mixer_class)
            yield mixer, "forward", RECURRENCES[recurrence].around_mixer(mixer.forward)
        model = imported(family.model_class)
        around = RECURRENCES[recurrence].around_model
        forward = model.forward if around is None else around(model.forward)
        if has_attention(model):
            forward = knowing_no_attention(forward)
        if forward is not model.forward:
            yield model, "forward", forward
    if RECURRENCES[recurrence].cache:
        cache = imported(RECURRENCES[recurrence].cache)
        yield module, cache.__base__.__name__, cache


def imported(path: str) -> Any:
    """The class of that full name, under its present or an earlier name."""
    module, _, name = path.rpartition(".")
    return find_member(import_module(module), name)


def find_member(module: Any, name: str) -> Any:
    """The member of a module, under its present or an earlier name."""
    for candidate in (name, EARLIER_NAMES.get(name, name)):
        if hasattr(module, candidate):
            return getattr(module, candidate)
    raise UserError(
        "transformers",
        transformers.__version__,
        f"its {module.__name__} has no {name}, which statex's ops replace",
        "use a version of transformers that statex was tested with",
    )
