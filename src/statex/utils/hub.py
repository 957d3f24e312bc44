"""Requests to the hub that end: one that is accepted and never answered would be waited for without end."""

from typing import Any

SILENCE = 60
"""Seconds without a byte after which a request fails for which huggingface_hub itself has no limit. It has for files
(HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_ETAG_TIMEOUT), and none for asking what a repository holds."""


def limit_waiting() -> None:
    """Let no request that huggingface_hub makes in this process wait for longer than `SILENCE`, or its own limit."""
    from huggingface_hub import get_session

    session = get_session()
    hooks = session.event_hooks
    if _limit not in hooks["request"]:
        session.event_hooks = hooks | {"request": [*hooks["request"], _limit]}


def _limit(request: Any) -> None:
    """Before a request is sent: give it the limits that it lacks."""
    limits = request.extensions.get("timeout", {})
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: SILENCE if limits.get(phase) is None else limits[phase] for phase in phases}
