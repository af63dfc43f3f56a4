"""Small model folders for the tests of convert/, and runs of make_delta and merge_delta."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from convert import make_delta, merge_delta
from convert.shards import Spec, Writer, plan_shards


def read_tensors(folder):
    """Return name -> tensor, by the reader of the safetensors library."""
    tensors = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor.flatten().view(torch.uint8), expected[name].flatten().view(torch.uint8)), name


def write_model(folder, weights, shard_bytes=10**9, tied=False):
    """Write weights and a config, by `convert.shards.Writer`."""
    folder.mkdir(parents=True)
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    with Writer(folder, plan_shards(specs, shard_bytes)) as writer:
        for name, tensor in weights.items():
            writer.put(name, tensor)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    return folder


def run_make_delta(script, base, target, delta):
    code, out, error = script(
        make_delta.main, "--base-model-path", base, "--target-model-path", target, "--delta-path", delta
    )
    assert code == 0, error
    return out


def run_merge_delta(script, base, delta, output, *more):
    code, out, error = script(
        merge_delta.main, "--base-model-path", base, "--delta-path", delta, "--target-model-path", output, *more
    )
    assert code == 0, error
    return out
