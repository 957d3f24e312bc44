"""Compare the tensors of a folder with those of the model that its configuration describes."""

import os
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from statex.checkpoint.headers import TensorHeader, stored_alike
from statex.errors import UserError, explained
from statex.expansion.stored import check_plan_tensors, stored_plan


def check_tensors(config: Any, headers: dict[str, TensorHeader], folder: str | os.PathLike) -> None:
    """Raise UserError unless the tensors in `headers` are exactly those of the model that `config` describes."""
    with explained("config.json", str(folder), "makes no model", "correct the configuration"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = _expected_shapes(model, headers)
    tied, ignored = set(model.all_tied_weights_keys), model._keys_to_ignore_on_load_unexpected or ()
    missing = [name for name in expected if name not in headers and name not in tied]
    headers = {name: header for name, header in headers.items() if not any(re.search(each, name) for each in ignored)}
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
    for name in tied & headers.keys():
        source = model.all_tied_weights_keys[name]
        if source not in headers:
            continue
        names = (headers[each].stored_as for each in (name, source))
        if not stored_alike(folder, *names):  # transformers would not tie them then
            problem = f"says that {name} is {source}, but the weights have both, and they differ"
            raise UserError("config.json: tie_word_embeddings", True, problem, "set it false, or remove one of them")
    if (plan := stored_plan(config)) is not None:
        check_plan_tensors(model, plan)


def _expected_shapes(model: Any, headers: dict[str, TensorHeader]) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors under their checkpoint names, which for some models differ from the model's."""
    tensors = model.state_dict()
    if any(name not in tensors for name in headers):
        tensors = revert_weight_conversion(model, tensors)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
