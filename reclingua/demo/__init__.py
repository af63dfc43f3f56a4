"""Demo page of tuned models: the models behind it, and a Gradio app."""
