"""Conversion of weights: exact deltas, merges, base models, model cards. The library never imports it."""
