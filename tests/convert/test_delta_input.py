"""Bad input of deltas and merges: another base, broken files, invalid folders, a full disk."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert import make_delta, merge_delta
from tests.helpers.weights import assert_same_bits, read_tensors, run_make_delta, run_merge_delta, write_model


@pytest.fixture
def three(tmp_path, script):
    """Folders base, target and delta, in two shards each."""
    torch.manual_seed(0)
    weights = {f"model.layers.{n}.a.weight": torch.randn(20, 30) for n in range(4)}
    base = write_model(tmp_path / "base", weights, shard_bytes=5000)
    target = write_model(tmp_path / "target", {name: 1.1 * w + 0.01 for name, w in weights.items()}, shard_bytes=5000)
    run_make_delta(script, base, target, tmp_path / "delta")
    return base, target, tmp_path / "delta"


@pytest.fixture
def refuse(three, refused, tmp_path):
    """refuse(base, delta): merging them must fail and leave no files."""

    def merge(base=three[0], delta=three[2], *more):
        before = sorted(tmp_path.rglob("*"))
        line = refused(
            merge_delta.main,
            *("--base-model-path", base, "--delta-path", delta, "--target-model-path", tmp_path / "out", *more),
        )
        assert sorted(tmp_path.rglob("*")) == before  # neither output nor anything half-written
        return line

    return merge


def test_another_base_is_rejected_by_name(three, refuse, tmp_path):
    base, target, delta = three
    weights = read_tensors(base)
    weights["model.layers.3.a.weight"].view(torch.int32)[-1, -1] ^= 1  # the last bit of the last tensor
    other = write_model(tmp_path / "other", weights)
    message = refuse(other)
    assert f"{other}: is not 'base'" in message and "'model.layers.3.a.weight' differs" in message
    narrow = write_model(tmp_path / "narrow", {name: w[:, :9].clone() for name, w in weights.items()})
    assert "of different architectures; the base of the delta is 'base'" in refuse(narrow)
    fewer = write_model(tmp_path / "fewer", dict(list(weights.items())[:3]))
    assert "has no tensor 'model.layers.3.a.weight'" in refuse(fewer)
    more = write_model(tmp_path / "more", weights | {"model.layers.4.a.weight": torch.ones(3)})
    assert f"{delta}: has no tensor 'model.layers.4.a.weight'" in refuse(more)
    longer = write_model(tmp_path / "longer", weights | {"model.layers.1.a.weight": torch.ones(21, 30)})
    assert "has 'model.layers.1.a.weight' as difference, which does not match this base" in refuse(longer)


def test_broken_files_are_rejected(three, refuse, tmp_path):
    base, _, delta = three
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = "model.safetensors.index.json"

    def broken(change, source=delta):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(source, tmp_path / "broken")
        change(tmp_path / "broken")
        return tmp_path / "broken"

    def cut(file):
        return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-50])

    def rewrite(file, change):
        def edit(folder):
            content = json.loads((folder / file).read_text())
            change(content)
            (folder / file).write_text(json.dumps(content))

        return edit

    def move(name, file):
        return rewrite(index, lambda content: content["weight_map"].update({name: file}))

    name = "model.layers.0.a.weight"
    for source in (base, delta):
        flags_for = (lambda path: (path, delta)) if source == base else (lambda path: (base, path))
        gone = broken(lambda folder: (folder / second).unlink(), source)
        assert f"{second}: no such file, but {index} names it" in refuse(*flags_for(gone))
        assert f"{second}: not a complete safetensors file" in refuse(*flags_for(broken(cut(second), source)))
        assert "tensor 'model.layers.0.a.weight', unlike" in refuse(*flags_for(broken(move(name, second), source)))
        assert "no such file" in refuse(*flags_for(broken(move(name, "model-3.safetensors"), source)))
        assert "in a file of the same folder" in refuse(*flags_for(broken(move(name, "../base/" + first), source)))
        assert "not valid JSON" in refuse(*flags_for(broken(lambda f: (f / index).write_text("{"), source)))
        assert "should have a weight_map" in refuse(
            *flags_for(broken(lambda f: (f / index).write_text('{"weight_map": 1}'), source))
        )
    assert "has no weights" in refuse(broken(lambda f: [file.unlink() for file in f.glob("model*")], base))
    assert "download the corrections files again" in refuse(
        delta=broken(lambda f: [file.unlink() for file in f.glob("corrections*")])
    )
    for wrong in (0, 10**6):
        counts = broken(rewrite("delta.json", lambda json, wrong=wrong: json["tensors"][name].update(corrected=wrong)))
        assert f"the corrections of tensor {name!r} do not match delta.json" in refuse(delta=counts)
    listed = broken(rewrite("delta.json", lambda json: json["tensors"][name].update(corrected=[1])))
    assert "corrected should be a number" in refuse(delta=listed)
    assert "has format 2" in refuse(delta=broken(rewrite("delta.json", lambda json: json.update(format=2))))
    assert "is no file of convert.make_delta" in refuse(
        delta=broken(rewrite("delta.json", lambda json: json["tensors"][name].update(extra=1)))
    )
    assert "does not match the weights in tensor" in refuse(
        delta=broken(rewrite("delta.json", lambda json: json["tensors"].pop(name)))
    )
    assert "not valid JSON" in refuse(delta=broken(lambda f: (f / "delta.json").write_text("no")))
    assert "config.json is not that of a language model" in refuse(
        delta=broken(lambda f: (f / "config.json").unlink())
    )

    def shift(folder):
        file = folder / "corrections-00001-of-00002.safetensors"
        save_file({k: v + 600 if "positions" in k else v for k, v in load_file(file).items()}, file)

    assert "are out of range" in refuse(delta=broken(shift))


class CreatesFile:
    """Object whose pickle creates a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("opened-a-pickle"),)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"a": CreatesFile()}, "contains objects other than tensors"),
        ({"a": [1]}, "'a' is a list, but should be a tensor"),
        ({"a": torch.ones(2, 3).t()}, "not contiguous"),
        (torch.ones(2), "should contain tensors by name"),
        (b"cut", "not a complete file of weights"),
        (b"", "not a complete file of weights"),
    ],
)
def test_bins_that_are_no_weights(three, refuse, tmp_path, content, message):
    """No code in a pickle is ever run."""
    (tmp_path / "bins").mkdir()
    path = tmp_path / "bins" / "pytorch_model.bin"
    if isinstance(content, bytes):
        torch.save(read_tensors(three[0]), path)
        path.write_bytes(path.read_bytes()[: -200 if content else 0])
    else:
        torch.save(content, path)
    assert message in refuse(tmp_path / "bins")
    assert not Path("opened-a-pickle").exists()


def test_invalid_folders(three, refuse, refused, tmp_path):
    base, target, delta = three
    assert "is both base and delta" in refuse(delta)
    assert "no such folder; for a model on the hub: hf download" in refuse(Path("meta/llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert "exists and is not empty" in refuse()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("precious")
    assert "is a file" in refuse()
    paths = ("--base-model-path", base, "--delta-path", tmp_path / "new")
    assert "is both base and target" in refused(make_delta.main, *paths, "--target-model-path", base)
    assert "exists and is not empty" in refused(
        make_delta.main, *paths[:2], "--target-model-path", target, "--delta-path", delta
    )
    (tmp_path / "out").unlink()
    (delta / "generation_config.json").symlink_to(tmp_path / "private.json")
    assert "generation_config.json: is a link, which is not followed" in refuse()
    assert not (tmp_path / "out").exists()
    assert "required: --delta-path" in refused(make_delta.main, *paths[:2], "--target-model-path", target)
    assert not (tmp_path / "new").exists()


def test_full_disk(three, refuse, refused, tmp_path):
    """A limit on the file size simulates a full disk."""
    base, target, delta = three
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert "out: cannot be written (File too large)" in refuse()
        paths = ("--base-model-path", base, "--target-model-path", target, "--delta-path", tmp_path / "new")
        assert "new: cannot be written (File too large)" in refused(make_delta.main, *paths)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("base", "target", "delta")]


def test_an_empty_folder_is_filled(three, script, tmp_path):
    base, target, delta = three
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    run_merge_delta(script, base, delta, tmp_path / "out")
    assert_same_bits(read_tensors(tmp_path / "there"), read_tensors(target))
