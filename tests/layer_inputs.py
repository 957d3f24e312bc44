"""Inputs and comparisons that the tests of the short convolution and the gated norm share, on any device."""

from contextlib import contextmanager

import torch

CONVOLUTIONS = {  # batch, tokens, channels, taps
    "usual": (2, 37, 100, 4),
    "several-tiles": (1, 300, 24, 2),
    "one-token": (2, 1, 130, 3),
    "many-taps": (1, 20, 16, 6),
}
NORMS = {  # rows, channels, channels of a group
    "one-group": (37, 96, 96),
    "groups": (1100, 16, 8),
    "odd": (1030, 25, 25),
    "few-rows": (3, 50, 50),
}


def convolution_inputs(shape, extra, dtype=torch.float32, device="cpu"):
    """x, a view of a wider tensor, with its weight, and what `extra` names: "bias", "context", "short-context",
    "documents"."""
    B, T, D, W = shape

    def normal(*size):
        return torch.randn(*size, device=device, dtype=dtype)

    inputs = {"x": normal(B, T, D + 16)[..., 8 : 8 + D], "weight": normal(D, W)}
    if "bias" in extra:
        inputs["bias"] = normal(D)
    if "context" in extra:
        inputs["left_context"] = normal(B, D, W + 1).mT
    if "short-context" in extra:
        inputs["left_context"] = normal(B, 1, D)
    if "documents" in extra:
        inputs["seq_idx"] = (torch.arange(T, device=device) // 5).expand(B, T)
    return inputs


def norm_inputs(shape, has_weight, has_gate, dtype=torch.float32, device="cpu"):
    """x and its gate, both views of a wider tensor, and a weight."""
    R, D, _ = shape
    wide = torch.randn(R, 2 * D + 8, device=device, dtype=dtype)
    inputs = {"x": wide[:, :D]}
    if has_weight:
        inputs["weight"] = torch.randn(D, device=device, dtype=dtype)
    if has_gate:
        inputs["gate"] = wide[:, D : 2 * D]
    return inputs


@contextmanager
def unpacked_once():
    """Saved tensors as gradient checkpointing has them: handed out a single time."""

    def unpack(holder):
        assert holder, "a saved tensor is read twice in a backward pass; gradient checkpointing refuses that"
        return holder.pop()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: [x], unpack):
        yield


def output_and_gradients(function, inputs, dtype=None, **options):
    """The output and the gradient of each floating-point input, for one fixed gradient of the output."""
    leaves = {
        name: x.to(dtype or x.dtype).detach().requires_grad_() if x.is_floating_point() else x
        for name, x in inputs.items()
    }
    with unpacked_once():
        output = function(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).to(next(iter(inputs.values())).dtype)
    output.backward(gradient.to(output))
    return {"output": output.detach()} | {name: x.grad for name, x in leaves.items() if x.is_floating_point()}
