"""Small folders of weights for the tests of convert/, and its two scripts run on them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from convert import make_delta, merge_delta
from convert.shards import Spec, Writer, plan


def weights_of(folder):
    """Name -> tensor, by the library's own reader."""
    found = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name].flatten().view(torch.uint8), other[name].flatten().view(torch.uint8)), name


def write_model(folder, weights, shard_bytes=10**9, tied=False):
    """A folder of these weights with a config, by our own writer."""
    folder.mkdir(parents=True)
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    with Writer(folder, plan(specs, shard_bytes)) as writer:
        for name, tensor in weights.items():
            writer.put(name, tensor)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    return folder


def made(script, base, target, delta):
    code, said, error = script(
        make_delta.main, "--base-model-path", base, "--target-model-path", target, "--delta-path", delta
    )
    assert code == 0, error
    return said


def merged(script, base, delta, output, *more):
    code, said, error = script(
        merge_delta.main, "--base-model-path", base, "--delta-path", delta, "--target-model-path", output, *more
    )
    assert code == 0, error
    return said
