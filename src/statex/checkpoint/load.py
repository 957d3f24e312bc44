"""Load a model and its tokenizer from a folder: strictly, and from safetensors only."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from statex.checkpoint.config import load_config
from statex.checkpoint.folder import model_folder
from statex.checkpoint.headers import TensorHeader, read_headers
from statex.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(folder: str | os.PathLike, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a recurrent model from a folder in Hugging Face format, or in FLA's `gla` format.

    Unlike `from_pretrained`, which makes a missing tensor random, it refuses a folder whose tensors are not exactly
    the model's. `kwargs` go to `from_pretrained`.

    Raises:
        UserError: no such folder, an unknown family, weights that are not safetensors, a truncated file, or a tensor
            that is missing, unexpected or of another shape.
    """
    folder = model_folder(folder)
    config = load_config(folder)
    headers = read_headers(folder)
    check_tensors(config, headers, folder)
    # Transformers divides Mamba2's out_proj on every load where this is set, and not only when it is initialised
    rescale = getattr(config, "rescale_prenorm_residual", False)
    if rescale:
        config.rescale_prenorm_residual = False
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **kwargs)
    if rescale:
        model.config.rescale_prenorm_residual = True
    return model


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a model folder, None where there is none.

    Raises:
        UserError: no such folder, or a tokenizer that cannot be read.
    """
    folder = model_folder(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        problem = f"its tokenizer cannot be read ({' '.join(str(error).split())[:100]})"
        raise UserError("model", str(folder), problem, "save the tokenizer again") from error


def check_tensors(config: Any, headers: dict[str, TensorHeader], folder: str | os.PathLike) -> None:
    """Raise UserError unless the tensors in `headers` are exactly those of the model that `config` describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in headers and name not in tied]
    unexpected = [name for name in headers if name not in expected]
    remedy = "the folder does not belong to this config.json, or is incomplete; fetch or save it again"
    if missing:
        raise UserError("model", str(folder), f"the tensor {missing[0]} is missing ({len(missing)} in all)", remedy)
    if unexpected:
        raise UserError(
            "model", str(folder), f"the tensor {unexpected[0]} is unexpected ({len(unexpected)} in all)", remedy
        )
    for name, header in headers.items():
        if header.shape != expected[name]:
            problem = f"the tensor {name} has shape {list(header.shape)}, the configuration says {list(expected[name])}"
            raise UserError("model", str(folder), problem, remedy)
