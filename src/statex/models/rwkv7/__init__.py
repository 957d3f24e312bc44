"""RWKV-7 as a Hugging Face model, with the parameter names of flash-linear-attention's checkpoints."""
