"""HTTP service of serve.py: models, batches of requests, routes, metrics."""
