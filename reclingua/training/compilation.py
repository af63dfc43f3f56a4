"""Compilation of a language model's decoder layers (--torch_compile), one region for all layers of a class."""

import os
import shutil
from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from reclingua.utils.errors import InputError


def check_compiler() -> None:
    """Raise ValueError if there is no C++ compiler, which torch.compile needs on a CPU and on a GPU."""
    names = (os.environ.get("CXX"), "g++", "clang++")
    if not any(name and shutil.which(name) for name in names):
        raise ValueError("--torch_compile needs a C++ compiler: install g++, or name one by the variable CXX")


def compile_layers(model: PreTrainedModel) -> int:
    """Compile the decoder layers of a model in place, for batches of any shape; return their number.

    The layers are those whose class is in `_no_split_modules`. Each is a graph of its own, one for its class.
    Names of weights and of modules stay, so that checkpoints are those of the model without compilation. The rest of
    the model is not compiled: the loss replaces the forward pass of the output head.

    Raises:
        InputError: the model names no such class, or its weights are quantised, which was never tried.
    """
    classes = {*(getattr(model, "language", model)._no_split_modules or ())}
    layers = [module for module in model.modules() if type(module).__name__ in classes]
    if not layers:
        raise InputError(f"--torch_compile: {type(model).__name__} does not state what its decoder layers are")
    if not all(weight.is_floating_point() for weight in model.parameters()):
        raise InputError("--torch_compile: is not for weights in 4 or 8 bits; leave one of them out")
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def without_compilation() -> AbstractContextManager:
    """Return a context in which compiled layers run as they are: shapes of a search change at each level."""
    return torch.compiler.set_stance("force_eager")
