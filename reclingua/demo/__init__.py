"""The parts of the page on which a model can be tried: what it asks of a model, and how it looks."""
