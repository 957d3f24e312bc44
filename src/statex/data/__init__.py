"""Text and synthetic recall data: from documents to the batches of each training step."""
