from statex.ops.gated_delta.chunk import chunk_gated_delta
from statex.ops.gated_delta.naive import naive_gated_delta
from statex.ops.gated_delta.step import step_gated_delta

__all__ = ["chunk_gated_delta", "naive_gated_delta", "step_gated_delta"]
