"""RWKV-7 against the logits of the reference implementation (RWKV/rwkv.cpp, tests/expected-logits-7v0-834K.bin).

The checkpoint is too large to be kept here. Fetch it and its expected logits from the tests of that repository, and
name their folder in STATEX_RWKV_DATA.
"""

import os
import re
import struct
from pathlib import Path

import pytest
import torch

import statex
from statex.models.caches import cache_argument, cache_of
from statex.models.rwkv7.configuration import RWKV7Config
from statex.models.rwkv7.modeling import RWKV7ForCausalLM

FOLDER = os.environ.get("STATEX_RWKV_DATA")
CHECKPOINT, LOGITS = "tiny-rwkv-7v0-834K-FP32.bin", "expected-logits-7v0-834K.bin"
NAMES = {  # ours, by rwkv.cpp's; a whole path, then parts of it
    r"^emb\.": "model.embeddings.", r"^ln_out\.": "model.norm.", r"^head\.": "lm_head.",
    r"^blocks\.(\d+)\.": r"model.layers.\1.", r"\.ln0\.": ".pre_norm.", r"\.ln1\.": ".attn_norm.",
    r"\.ln2\.": ".ffn_norm.", r"\.att\.": ".attn.", r"\.attn\.ln_x\.": ".attn.g_norm.",
    r"\.attn\.receptance\.": ".attn.r_proj.", r"\.attn\.key\.": ".attn.k_proj.",
    r"\.attn\.value\.": ".attn.v_proj.", r"\.attn\.output\.": ".attn.o_proj.",
    r"\.attn\.([wavg])0$": r".attn.\1_lora.lora.2.bias", r"\.attn\.([wavg])1$": r".attn.\1_lora.lora.0.weight",
    r"\.attn\.([wavg])2$": r".attn.\1_lora.lora.2.weight",
}  # fmt: skip


def read_tensors(path):
    """The fp32 tensors of a file of rwkv.cpp, by name."""
    data, place, tensors = path.read_bytes(), 24, {}
    assert struct.unpack_from("<2I", data) == (0x67676D66, 101)
    while place < len(data):
        num_dimensions, name_length, dtype = struct.unpack_from("<3I", data, place)
        assert dtype == 0
        shape = struct.unpack_from(f"<{num_dimensions}I", data, place + 12)[::-1]
        place += 12 + 4 * num_dimensions
        name = data[place : place + name_length].decode()
        place += name_length
        tensor = torch.frombuffer(bytearray(data[place : place + 4 * torch.Size(shape).numel()]), dtype=torch.float32)
        tensors[name] = tensor.view(shape)
        place += 4 * tensor.numel()
    return tensors


def renamed(tensors):
    """The same under our names and in our shapes."""
    ours = {}
    for name, tensor in tensors.items():
        for old, new in NAMES.items():
            name = re.sub(old, new, name)
        if name.endswith(".x_rwkvag"):
            ours |= {name.removesuffix("rwkvag") + letter: row[None] for letter, row in zip("rwkvag", tensor)}
        else:
            ours[name] = tensor.flatten() if tensor.shape[:2] == (1, 1) else tensor
    return ours


def model_of(tensors):
    layer = "model.layers.1.attn."
    vocab_size, hidden_size = tensors["model.embeddings.weight"].shape
    num_heads, head_dim = tensors[f"{layer}r_k"].shape
    ranks = {name: tensors[f"{layer}{letter}_lora.lora.0.weight"].shape[0] for letter, name in RANKS.items()}
    config = RWKV7Config(
        vocab_size=vocab_size, hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim,
        num_hidden_layers=len([name for name in tensors if name.endswith("attn_norm.weight")]),
        intermediate_size=tensors["model.layers.0.ffn.key.weight"].shape[0], **ranks,
    )  # fmt: skip
    model = RWKV7ForCausalLM(config).eval()
    model.load_state_dict(tensors, strict=True)
    return model


RANKS = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}


@pytest.mark.skipif(FOLDER is None, reason="STATEX_RWKV_DATA names no folder of rwkv.cpp's test files")
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("piece", [1, 2, 3])
@torch.no_grad()
def test_the_logits_of_the_reference_implementation(piece, expanded):
    """After the bytes `"in`, fed in pieces or at once, and with a larger state that preserves the function."""
    folder = Path(FOLDER)
    model, cache = model_of(renamed(read_tensors(folder / CHECKPOINT))), None
    if expanded:
        statex.expand(model, every=2, init="preserve")
    wanted = torch.frombuffer(bytearray((folder / LOGITS).read_bytes()), dtype=torch.float32)
    for part in torch.tensor([list(b'"in')]).split(piece, dim=1):
        output = model(part, use_cache=True, **{cache_argument(model): cache})
        cache = cache_of(output)
    difference = float((output.logits[0, -1] - wanted).abs().max())
    print(f"largest difference {difference:.2e}")
    assert difference < 1e-5
