"""Continued training of a Yes/No model: its own weights are taken over from a checkpoint of the same method."""

from pathlib import Path

import torch

from reclingua.models.collaborative import copy_known_rows
from reclingua.models.yes_no import YesNoModel, read_weights
from reclingua.utils.errors import InputError


@torch.no_grad()
def copy_own_weights(model: YesNoModel, folder: str | Path) -> None:
    """Copy projector, normalization and saved collaborative weights from a checkpoint of the same method.

    Raises:
        InputError: the projector there is of another size, or the collaborative model of another kind.
    """
    state = read_weights(folder)
    for name, tensor in model.state_dict().items():
        if model.component_of(name) == "projector" and name in state:
            if state[name].shape != tensor.shape:
                raise InputError(
                    f"{folder}: its weight {name} has the shape {list(state[name].shape)}, here it is "
                    f"{list(tensor.shape)}; give a collaborative model as wide, and the flags of then"
                )
            tensor.copy_(state[name])
    known = {name.removeprefix("cf_model."): w for name, w in state.items() if name.startswith("cf_model.")}
    if model.cf_model is not None and known:
        copy_known_rows(model.cf_model, known, folder)
