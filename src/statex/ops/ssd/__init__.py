from statex.ops.ssd.chunk import chunk_ssd
from statex.ops.ssd.naive import naive_ssd
from statex.ops.ssd.step import step_ssd

__all__ = ["chunk_ssd", "naive_ssd", "step_ssd"]
