"""Constrained decoding: a trie of legal indices and a beam search over it."""
