"""Model folders as flash-linear-attention writes them."""

import json

import torch
from safetensors.torch import save_file


def write_folder(folder, config, shapes):
    """A folder of this configuration with random tensors of these shapes, which are returned."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        scale, shift = (0.2, 1.0) if "norm" in name and name.endswith(".weight") else (0.3, 0.0)
        tensors[name] = scale * torch.randn(shape, generator=generator) + shift
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors
