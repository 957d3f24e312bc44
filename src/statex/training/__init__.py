"""Post-training (and pre-training): a thin transformers.Trainer and the loss it uses."""

CHECKPOINTS = "checkpoints"
"""Folder of a stage's checkpoints while it trains."""
SUMMARY = "training.json"
"""What a stage of training cost; beside its model and written after it, so where it is, training is finished."""
