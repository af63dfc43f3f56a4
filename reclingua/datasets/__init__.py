"""Data sets of interactions and ratings, and the samples, prompts and batches made of them."""
