"""A recipe's whole run: its processes and what they show."""
