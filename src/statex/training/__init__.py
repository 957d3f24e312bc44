"""Post-training (and pre-training): a thin transformers.Trainer and the loss it uses."""
