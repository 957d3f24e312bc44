"""Load a model and its tokenizer from a folder: strictly, and from safetensors only."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from statex.checkpoint.config import describe
from statex.checkpoint.folder import model_folder
from statex.errors import UserError, explained
from statex.families import Family, family_of
from statex.models.factory import expanded_model_classes
from statex.models.replay import ReplayExpansion

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


def load(
    folder: str | os.PathLike, *, dtype: torch.dtype | str = "auto", check_finite: bool = True, **kwargs: Any
) -> PreTrainedModel:
    """Load a recurrent model from a folder in Hugging Face format, or in FLA's format of `gla` or `rwkv7`;
    transformers' `xlstm` becomes statex's own model. FLA's other models become the classes that can hold an expansion,
    which keep packed documents apart and refuse unknown keywords, where FLA's drop them.

    Unlike `from_pretrained`, which makes a missing tensor random, it refuses a folder whose tensors are not exactly
    the model's. No code of the folder is run.

    Args:
        folder: a model folder, or a name on the hub.
        dtype: of the model; "auto" takes the one that the folder names.
        check_finite: False also loads infinite or NaN weights, for finding out what went wrong.
        kwargs: passed to `from_pretrained`.

    Raises:
        UserError: no such folder, an unknown family, a configuration that describes no model, weights that are not
            safetensors, not floating-point or not finite, a truncated file, or a tensor that is missing, unexpected
            or of another shape.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError("dtype", dtype, "is not a dtype for weights", f"use one of {', '.join(DTYPES)}")
    found = describe(folder)
    folder, config = found.folder, found.config
    # Transformers divides Mamba2's out_proj on every load where this is set, and not only when it is initialised
    rescale = getattr(config, "rescale_prenorm_residual", False)
    if rescale:
        config.rescale_prenorm_residual = False
    with explained("model", str(folder), "cannot be loaded", "fetch or save it again"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, **kwargs
        )
    if rescale:
        model.config.rescale_prenorm_residual = True
    family: Family = family_of(config)
    if family.library == "fla" and not isinstance(model, ReplayExpansion):
        expanded_model_classes(family).causal_lm.adopt(model)
    if check_finite:
        _refuse_infinite_weights(model, folder)
    return model


def _refuse_infinite_weights(model: PreTrainedModel, folder: Path) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and not tensor.isfinite().all():
            number = int((~tensor.isfinite()).sum())
            problem = f"the tensor {name} has {number} values that are infinite or NaN"
            raise UserError(
                "model",
                str(folder),
                problem,
                "take an earlier one, or give statex.load check_finite=False",
            )


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a model folder, None where there is none.

    Raises:
        UserError: no such folder, a tokenizer that cannot be read or needs code of the folder, or one with more
            ids than the model.
    """
    folder = model_folder(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    vocabulary = describe(folder).config.vocab_size  # first: transformers reads the configuration for a tokenizer too
    tokenizer = read_tokenizer(folder)
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary:
        problem = f"its tokenizer has ids up to {highest}, but the model has only {vocabulary} embeddings"
        remedy = "save the tokenizer that the model was trained with, or resize the model's embeddings and train them"
        raise UserError("model", str(folder), problem, remedy)
    return tokenizer


def read_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a folder that holds one, whatever else it holds; none of its code is run.

    Raises:
        UserError: it cannot be read, or needs code of the folder.
    """
    with explained("model", str(folder), "its tokenizer cannot be read", "save the tokenizer again"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
