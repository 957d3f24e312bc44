"""Measuring a single model, outside of a run."""

from pathlib import Path
from typing import Any


def measure_folder(model: str, sections: Any, folder: Path) -> Any:
    """Load a model and measure it by the sections of a recipe; its results are merged into those in `folder`."""
    import torch

    from statex.checkpoint import load, load_tokenizer
    from statex.evaluation import Request, measure_model
    from statex.expansion.state import state_report
    from statex.results import merge_results
    from statex.run.progress import Display
    from statex.utils.atomic import working_in
    from statex.utils.environment import default_device

    tokenizer = load_tokenizer(model)
    dtype = sections.evaluation.dtype
    network: Any = load(model, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    network = network.to(device=default_device()).eval()
    identity = {
        "model": model,
        "state_bytes": state_report(network).total_bytes,
        "dtype": str(network.dtype).removeprefix("torch."),
    }
    with working_in(folder, "output"), Display() as display:
        request = Request(
            sections.evaluation,
            output=folder,
            text=sections.evaluation.text or sections.data.text,
            count_text=sections.data.text,
            progress=lambda name, finished, total: display.update(Path(model).name, name, finished, total),
            identity=identity,
        )
        measured = measure_model(network, tokenizer, request)
        merge_results(folder / "results.jsonl", measured.results)
    return measured
