"""The recurrences: gated linear attention (`gla`), state space duality (`ssd`), the first Mamba's selective scan
(`selective_scan`), the gated delta rule (`gated_delta`) and the generalised one of RWKV-7 (`generalized_delta`), each
also one token at a time; and the operations around them in a layer: a short convolution before, a gated norm after."""

from statex.ops.backends import use_backend
from statex.ops.carried import carried_state
from statex.ops.layer_operations import gated_rms_norm, short_convolution, short_convolution_step
from statex.ops.parallel import sequence_parallel
from statex.ops.recurrences import (
    gated_delta,
    gated_delta_step,
    generalized_delta,
    generalized_delta_step,
    gla,
    gla_step,
    selective_scan,
    selective_scan_step,
    ssd,
    ssd_step,
)

__all__ = [
    "carried_state",
    "gated_delta",
    "gated_delta_step",
    "gated_rms_norm",
    "generalized_delta",
    "generalized_delta_step",
    "gla",
    "gla_step",
    "selective_scan",
    "selective_scan_step",
    "sequence_parallel",
    "short_convolution",
    "short_convolution_step",
    "ssd",
    "ssd_step",
    "use_backend",
]
