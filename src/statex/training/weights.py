"""The weights of a model in training: in fp32, the trainable ones, and as they are saved."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from statex.errors import UserError
from statex.expansion.edits import ExpansionPlan, StoredPlan
from statex.families import family_of


def require_master_weights(model: PreTrainedModel) -> None:
    """Raise UserError where the weights have fewer bits than fp32: small updates would be rounded away."""
    narrow = {parameter.dtype for parameter in model.parameters() if parameter.dtype.itemsize < 4}
    if narrow:
        problem = "is too coarse for the weights that an optimizer updates"
        raise UserError("model.dtype", str(narrow.pop()), problem, "load the model with dtype=torch.float32")


def freeze_all_but_expanded(model: PreTrainedModel, plan: ExpansionPlan | StoredPlan | None) -> None:
    """Leave gradients only to the mixers that the plan changed, and to norms it reset.

    Raises:
        UserError: the model has no plan.
    """
    if plan is None:
        raise UserError(
            "training.train_only_expanded", True, "the model has no expanded layers", "expand it first, or set it false"
        )
    family = family_of(model.config)
    prefixes = tuple(f"{family.mixer_name(model.config, layer.index)}." for layer in plan.layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes) or name in plan.fresh_tensors)


def without_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model on the meta device, in another dtype: what save_pretrained writes besides the weights."""
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    outline.generation_config = model.generation_config
    return outline


def in_dtype(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors in another dtype; those that share memory, as tied weights do, keep sharing it."""
    done: dict[tuple, torch.Tensor] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            done.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
    return {name: done.get((tensor.data_ptr(), tensor.shape), tensor) for name, tensor in state.items()}
