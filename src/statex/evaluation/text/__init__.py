"""Held-out text: its windows, and the table of the training text's n-grams."""
