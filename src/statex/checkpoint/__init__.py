"""Model folders: load them strictly and from safetensors only, inspect them, save them; FLA's format both ways."""

from statex.checkpoint.config import load_config
from statex.checkpoint.fla import export_fla
from statex.checkpoint.headers import TensorHeader, read_headers
from statex.checkpoint.inspection import Inspection, inspect
from statex.checkpoint.load import load, load_tokenizer, read_tokenizer
from statex.checkpoint.save import base_name, save_with_companions, stored_dtype, write_card
from statex.checkpoint.tensors import check_tensors

__all__ = [
    "Inspection",
    "TensorHeader",
    "base_name",
    "check_tensors",
    "export_fla",
    "inspect",
    "load",
    "load_config",
    "load_tokenizer",
    "read_headers",
    "read_tokenizer",
    "save_with_companions",
    "stored_dtype",
    "write_card",
]
