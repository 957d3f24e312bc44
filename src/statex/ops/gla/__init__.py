from statex.ops.gla.chunk import chunk_gla
from statex.ops.gla.naive import naive_gla
from statex.ops.gla.step import step_gla

__all__ = ["chunk_gla", "naive_gla", "step_gla"]
