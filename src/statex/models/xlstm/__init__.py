"""xLSTM as a Hugging Face model."""
