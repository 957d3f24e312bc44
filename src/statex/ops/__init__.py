"""The recurrences: gated linear attention (`gla`) and state space duality (`ssd`), each also one token at a time."""

from statex.ops.backends import gla, gla_step, ssd, ssd_step, use_backend

__all__ = ["gla", "gla_step", "ssd", "ssd_step", "use_backend"]
