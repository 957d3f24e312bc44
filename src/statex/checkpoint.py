"""Load and save model folders: strictly, from safetensors only, and to and from FLA's GLA format."""

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from statex.errors import UserError
from statex.expansion.plan import stored_plan
from statex.expansion.state import StateReport, state_report
from statex.families import family_of, unknown_family
from statex.files import new_folder
from statex.models.gla.configuration import GLAConfig
from statex.models.registration import register_configurations
from statex.models.shim import SHIM

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
FLA_MODEL_TYPE = "gla"
NOT_IN_FLA = ("expansion", "auto_map")
NO_COMPANIONS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".py",
    ".index.json",
)
"""Endings of files that are weights, training state or code: not copied beside an expanded model."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the names of safetensors."""


@dataclass(frozen=True)
class TensorHeader:
    """One entry of a safetensors header."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Inspection:
    """What a model folder holds, read from config.json and safetensors headers alone."""

    folder: str
    model_type: str
    num_parameters: int
    dtypes: list[str]
    state: StateReport
    expansion: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        fields = {name: getattr(self, name) for name in ("folder", "model_type", "num_parameters", "dtypes")}
        return fields | {"state": self.state.to_dict(), "expansion": self.expansion}


def load(folder: str | os.PathLike, *, dtype: torch.dtype | str = "auto", **kwargs: Any) -> PreTrainedModel:
    """Load a recurrent model from a folder in Hugging Face format, or in FLA's `gla` format.

    Unlike `from_pretrained`, which makes a missing tensor random, it refuses a folder whose tensors are not exactly
    the model's. `kwargs` go to `from_pretrained`.

    Raises:
        UserError: no such folder, an unknown family, weights that are not safetensors, a truncated file, or a tensor
            that is missing, unexpected or of another shape.
    """
    folder = _model_folder(folder)
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


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str | os.PathLike) -> Any:
    """The tokenizer of a model folder, None where there is none.

    Raises:
        UserError: no such folder, or a tokenizer that cannot be read.
    """
    folder = _model_folder(folder)
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        problem = f"its tokenizer cannot be read ({' '.join(str(error).split())[:100]})"
        raise UserError("model", str(folder), problem, "save the tokenizer again") from error


def load_config(folder: str | os.PathLike) -> Any:
    """The configuration of a model folder; FLA's `gla` becomes our `statex_gla`.

    Raises:
        UserError: no config.json, damaged JSON, an unknown family or a value that the family refuses.
    """
    register_configurations()
    path = _model_folder(folder) / "config.json"
    values = _read_json(path)
    model_type = values.get("model_type")
    try:
        if model_type == FLA_MODEL_TYPE:
            config = GLAConfig.from_dict(_from_fla(values))
        elif model_type in list(CONFIG_MAPPING):
            config = AutoConfig.from_pretrained(path.parent)
        else:
            raise unknown_family(model_type)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        cause = error.__cause__ or error  # a strict configuration's message says only which check failed
        if isinstance(cause, UserError):
            raise cause from None
        problem = f"is refused: {' '.join(str(cause).split())}".rstrip(".")
        raise UserError("config.json", str(path), problem, "correct the configuration") from error
    family_of(config)
    return config


def read_headers(folder: str | os.PathLike) -> dict[str, TensorHeader]:
    """Name, shape and dtype of every tensor of a folder, without reading any weights.

    Raises:
        UserError: there are no safetensors files, or one is truncated or damaged.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        names = _shards(folder / INDEX)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        problem = f"has only pickled weights ({pickled[0]})" if pickled else f"has no {WEIGHTS}"
        raise UserError(
            "model", str(folder), problem, "save the model again with save_pretrained, which writes safetensors"
        )
    headers: dict[str, TensorHeader] = {}
    for name in names:
        headers |= _read_header(folder / name)
    return headers


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


def inspect(folder: str | os.PathLike) -> Inspection:
    """What a model folder holds: family, parameters, dtypes and the state of each layer; reads headers, no weights.

    Raises:
        UserError: as `load`.
    """
    folder = _model_folder(folder)
    config, headers = load_config(folder), read_headers(folder)
    check_tensors(config, headers, folder)
    plan = stored_plan(config)
    num_parameters = sum(torch.Size(header.shape).numel() for header in headers.values())
    return Inspection(
        folder=str(folder),
        model_type=config.model_type,
        num_parameters=num_parameters,
        dtypes=sorted({header.dtype for header in headers.values()}),
        state=state_report(config),
        expansion=f"{plan.kind}, init {plan.init}, factor {plan.factor}" if plan else None,
    )


def export_fla(model: PreTrainedModel, out: str | os.PathLike) -> None:
    """Write an un-expanded GLA as a `gla` folder that flash-linear-attention loads.

    Raises:
        UserError: the model is no GLA, is expanded (FLA's configuration cannot say so), or `out` exists.
    """
    if not isinstance(model.config, GLAConfig):
        raise UserError("model", model.config.model_type, "is no GLA", "FLA's format is for statex_gla models only")
    plan = stored_plan(model.config)
    if plan is not None and plan.kind == "expand":
        raise UserError(
            "model", model.config.name_or_path or "statex_gla", "is expanded, which FLA's format cannot express",
            "keep it in its own format, with save_pretrained",
        )  # fmt: skip
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        (folder / f"{SHIM}.py").unlink()
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values = {key: value for key, value in values.items() if key not in NOT_IN_FLA}
        values |= {"model_type": FLA_MODEL_TYPE, "architectures": ["GLAForCausalLM"]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def save_with_companions(model: PreTrainedModel, source: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write `model` to the new folder `out` with what its source folder holds beside the weights, and a model card.

    Tokenizer, chat template and generation configuration are copied as files, so that nothing in them changes.

    Raises:
        UserError: `out` exists.
    """
    base, source = base_name(source), _model_folder(source)
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        for path in sorted(source.iterdir()):
            left_out = ("config.json", "README.md", "trainer_state.json", ".gitattributes")
            if path.is_file() and path.name not in left_out and not path.name.endswith(NO_COMPANIONS):
                shutil.copyfile(path, folder / path.name)
        write_card(folder, model, base)


def write_card(folder: Path, model: PreTrainedModel, base: str | None, training: dict[str, Any] | None = None) -> None:
    """Write the model card, README.md, of a saved model.

    Args:
        folder: where it was saved.
        model: the model; weights are not needed.
        base: name of the checkpoint it was made from (`base_name`), None for a model made from scratch.
        training: settings of its training, None where it was not trained.
    """
    from statex.reporting.model_card import model_card

    plan = stored_plan(model.config)
    done = [] if plan is None else ["state expanded" if plan.kind == "expand" else "re-initialised"]
    done += ["trained"] if training else []
    card = model_card(
        name=", ".join([base or f"{model.config.model_type} from scratch", *done]),
        model_type=model.config.model_type,
        base_model=base,
        plan=plan.to_dict() if plan else None,
        state=state_report(model).to_dict(),
        num_parameters=model.num_parameters(),
        training=training,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def base_name(source: str | os.PathLike) -> str:
    """What a checkpoint is called: on the hub `organisation/name`, also where it lies in the hub's cache, else its
    folder's name, with the one above where a run gives all its models the same."""
    folder = Path(source)
    if not folder.is_dir():
        return str(source)
    *above, last = folder.absolute().parts
    if above[-1:] == ["snapshots"] and above[-2].startswith("models--"):
        return above[-2].removeprefix("models--").replace("--", "/")
    return above[-1] if last in ("trained", "expanded") else last


def stored_dtype(folder: str | os.PathLike) -> torch.dtype:
    """The dtype in which `load` gives a folder's model: its configuration's, else its first tensor's.

    Raises:
        UserError: as `load`.
    """
    folder = _model_folder(folder)
    dtype = load_config(folder).dtype
    if dtype is None:
        first = next(iter(read_headers(folder).values()))
        dtype = DTYPES.get(first.dtype, torch.float32)
    return dtype


def _model_folder(folder: str | os.PathLike) -> Path:
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        if folder.is_dir():
            raise UserError("model", str(folder), "has no config.json", "give a folder that save_pretrained wrote")
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
            return Path(snapshot_download(str(folder), allow_patterns=patterns))
        except Exception as error:
            raise UserError(
                "model", str(folder), f"is no folder here, and the hub gave none ({type(error).__name__})",
                "give the path of a model folder, or a hub name while the hub can be reached",
            ) from None  # fmt: skip
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UTF-8 or JSON
        raise UserError(path.name, str(path), f"is damaged ({error})", "restore it from the source") from None
    if not isinstance(values, dict):
        raise UserError(path.name, str(path), "is damaged (no JSON object)", "restore it from the source")
    return values


def _shards(index: Path) -> list[str]:
    """Names of the weight files that an index lists."""
    values = _read_json(index)
    if not all(isinstance(values.get(key), dict) for key in ("metadata", "weight_map")):
        problem = "is damaged (no metadata or no weight_map)"
        raise UserError(index.name, str(index), problem, "restore it from the source")
    return sorted(set(values["weight_map"].values()))


def _from_fla(values: dict[str, Any]) -> dict[str, Any]:
    """FLA's configuration under our model_type; fields of theirs that mean nothing here are carried along."""
    kept = {key: value for key, value in values.items() if key not in ("architectures", "auto_map")}
    return kept | {"model_type": GLAConfig.model_type}


def _read_header(path: Path) -> dict[str, TensorHeader]:
    """Names and shapes in a safetensors file, its length checked against what its header promises."""
    remedy = "fetch or save the file again"
    if not path.is_file():
        raise UserError("model", str(path), "is listed in the index but is not there", remedy)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 < length <= size - 8:
            raise UserError("model", str(path), f"is truncated: {size} bytes do not hold its header", remedy)
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            headers = {name: TensorHeader(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise UserError("model", str(path), "is no safetensors file: its header is damaged", remedy) from None
    if size != end:
        raise UserError("model", str(path), f"is truncated or damaged: {size} bytes instead of {end}", remedy)
    return headers
