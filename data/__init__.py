"""Raw interactions -> dataset folder -> instruction datasets."""
