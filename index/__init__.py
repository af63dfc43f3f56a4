"""Item texts -> embeddings -> RQ-VAE -> semantic IDs."""
