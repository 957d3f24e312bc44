"""What both benchmarks do around their cases: choose them, run them one by one, print and write their records."""

import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from statex.errors import UserError
from statex.utils import environment
from statex.utils.atomic import write_text_atomic


def run_cases(
    asked: Sequence[str] | None,
    known: Collection[str],
    run_case: Callable[[str, torch.device], list[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str],
    device: torch.device | str | None,
    path: Path | None,
) -> list[dict[str, Any]]:
    """Run the cases that were asked for (default: all known), each record with device, commit and versions.

    Args:
        asked, known: names of cases.
        run_case: the records of one case on a device.
        line: a record as it is printed to stderr.
        device: default: CUDA where there is one.
        path: also write the records here, as JSON; after each case, so that one that fails loses none before it.

    Raises:
        UserError: an unknown case.
    """
    for name in asked or ():
        if name not in known:
            raise UserError("case", name, "is unknown", f"use one of {', '.join(known)}")
    device = torch.device(device) if device is not None else environment.default_device()
    about = {
        "device": environment.device_name(device),
        "commit": environment.source_commit(),
        "versions": environment.versions(),
    }
    records = []
    for name in asked or known:
        for record in run_case(name, device):
            records.append(record | about)
            print(line(record), file=sys.stderr, flush=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps(records, indent=1) + "\n")
    return records
