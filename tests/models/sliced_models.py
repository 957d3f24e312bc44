"""Runs tiny models on slices of sequences in two forked gloo ranks, against whole ones: `sliced_models.py FOLDER`."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Mamba2Config

import statex.models.registration  # noqa: F401
from statex.models.dispatch import statex_ops
from statex.models.gla.configuration import GLAConfig
from statex.ops import sequence_parallel

CONFIGS = {
    "gla": lambda: GLAConfig(hidden_size=32, num_hidden_layers=2, num_heads=2, vocab_size=64, use_short_conv=True),
    "mamba2": lambda: Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=2, vocab_size=64
    ),
}


def check(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    ids = torch.randint(0, 64, (2, 24))
    weights = torch.randn(2, 24, 64)
    with statex_ops():
        wanted = model(input_ids=ids, use_cache=False).logits
        (wanted * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        ids, weights, wanted = (x.chunk(2, dim=1)[dist.get_rank()] for x in (ids, weights, wanted))
        with sequence_parallel(dist.group.WORLD):
            logits = model(input_ids=ids, use_cache=False).logits
            (logits * weights).sum().backward()
    assert (logits - wanted).norm() <= 1e-5 * wanted.norm(), family
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), (family, name)


def main(folder: str) -> None:
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            store, timeout = f"file://{folder}/store", timedelta(seconds=60)
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
            for family in CONFIGS:
                check(family)
            dist.barrier()
            os._exit(0)
        children.append(child)
    ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ended == [0, 0], ended


if __name__ == "__main__":
    main(sys.argv[1])
