from statex.ops.selective_scan.chunk import chunk_selective_scan
from statex.ops.selective_scan.naive import naive_selective_scan
from statex.ops.selective_scan.step import step_selective_scan

__all__ = ["chunk_selective_scan", "naive_selective_scan", "step_selective_scan"]
