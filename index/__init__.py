"""Item text -> embeddings -> RQ-VAE -> item indices."""
