"""The fingerprint of a base model depends on its weights alone, wherever and in how many files they are."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from reclingua.models.language import base_fingerprint
from reclingua.utils.errors import InputError
from tests.helpers.models import make_model


@pytest.fixture
def base(tmp_path):
    make_model("llama", 64, spread=1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_shards_and_configs_do_not_matter(base, tmp_path):
    make_model("llama", 64, spread=1).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "shards/config.json").write_text("{}")
    assert base_fingerprint(base) == base_fingerprint(tmp_path / "shards")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
def test_other_weights_of_the_same_shapes(base, name):
    before, weights = base_fingerprint(base), load_file(base / "model.safetensors")
    weights[name] = weights[name] + 1e-3
    save_file(weights, base / "model.safetensors")
    assert base_fingerprint(base) != before


def test_a_hub_name_is_found_in_the_cache(base, tmp_path, monkeypatch):
    folder = tmp_path / "hub/models--me--tiny"
    shutil.copytree(base, folder / "snapshots/0f1e")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0f1e")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base_fingerprint("me/tiny") == base_fingerprint(base)
    with pytest.raises(InputError, match="me/unknown: no such folder, not in the cache"):
        base_fingerprint("me/unknown")


def test_pickles_are_not_opened(base, tmp_path):
    (tmp_path / "old").mkdir()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "old/pytorch_model.bin")
    first = base_fingerprint(tmp_path / "old")
    torch.save({"weight": torch.ones(2)}, tmp_path / "old/pytorch_model.bin")
    assert base_fingerprint(tmp_path / "old") != first
    (tmp_path / "none").mkdir()
    (tmp_path / "none/config.json").write_text(json.dumps({}))
    with pytest.raises(InputError, match="holds no weights"):
        base_fingerprint(tmp_path / "none")
