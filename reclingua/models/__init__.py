"""Loading and extending a language model; making the base models that the presets use."""
