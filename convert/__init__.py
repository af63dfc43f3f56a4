"""Weights on their way to others: exact deltas, merges, model cards. Stands apart: nothing else imports it."""
