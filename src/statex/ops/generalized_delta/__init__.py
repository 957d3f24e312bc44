from statex.ops.generalized_delta.chunk import chunk_generalized_delta
from statex.ops.generalized_delta.naive import naive_generalized_delta
from statex.ops.generalized_delta.step import step_generalized_delta

__all__ = ["chunk_generalized_delta", "naive_generalized_delta", "step_generalized_delta"]
