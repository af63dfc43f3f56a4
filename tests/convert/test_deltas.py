"""Deltas and their merging: every bit comes back, little memory is used, and what does not fit together is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import test as test_script
from convert.make_delta import bitwise_view
from convert.shards import PIECE, Spec, Writer, paired_chunks, plan, read_weights
from tests.helpers.models import make_model
from tests.helpers.weights import made, merged, same_bits, weights_of, write_model

HALVES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[2]


def special(dtype, count):
    """Random bit patterns: infinities, NaNs with all sorts of payloads, subnormal numbers and zeros of both signs."""
    kind = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    draw = torch.Generator().manual_seed(count)
    bits = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (count,), generator=draw, dtype=kind)
    values = bits.view(dtype)
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")]).to(dtype)
    return values


@pytest.mark.parametrize("dtype", HALVES)
def test_every_bit_comes_back(script, tmp_path, dtype):
    """Tuned weights, random bit patterns, a grown vocabulary, other dtypes, tensors larger than a piece and empty."""
    draw = torch.Generator().manual_seed(0)

    def near(*shape):
        weight, change = torch.randn(2, *shape, generator=draw, dtype=torch.float64)
        return (0.02 * weight).to(dtype), (0.02 * weight + 0.001 * change).to(dtype)

    pairs = {
        "model.layers.0.a.weight": near(900, 1200),
        "model.layers.0.b.weight": (special(dtype, 5000).reshape(50, 100), special(dtype, 5001)[1:].reshape(50, 100)),
        "model.norm.weight": (torch.ones(7, dtype=dtype), -torch.zeros(7, dtype=dtype)),
        "model.embed_tokens.weight": (near(40, 8)[0], near(50, 8)[1]),
        "lm_head.weight": (near(50, 8)[0], near(40, 8)[1]),
        "model.none.weight": (torch.empty(0, 4, dtype=dtype), torch.empty(0, 4, dtype=dtype)),
        "model.scale": (torch.tensor(2.0, dtype=dtype), torch.tensor(-0.0, dtype=dtype)),
        "model.eight": (torch.arange(5, dtype=torch.int8), torch.arange(5, dtype=torch.int8) - 3),
        "model.float8": (torch.ones(3).to(torch.float8_e4m3fn), torch.zeros(3).to(torch.float8_e4m3fn)),
        "model.mask": (torch.tensor([True, False]), torch.tensor([False, False])),
    }
    assert pairs["model.layers.0.a.weight"][0].numel() > 2 * PIECE
    base = write_model(tmp_path / "base", {name: pair[0] for name, pair in pairs.items()}, shard_bytes=10**5)
    target = write_model(tmp_path / "target", {name: pair[1] for name, pair in pairs.items()}, shard_bytes=10**6)
    made(script, base, target, tmp_path / "delta")
    merged(script, base, tmp_path / "delta", tmp_path / "merged")
    same_bits(weights_of(tmp_path / "merged"), weights_of(target))
    for file in target.glob("model*"):
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()  # the same shards

    # Anyone who adds the delta, LC-Rec's way, has the target up to rounding.
    delta, told = (
        weights_of(tmp_path / "delta"),
        json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"],
    )
    name = "model.layers.0.a.weight"
    torch.testing.assert_close(pairs[name][0] + delta[name], pairs[name][1], rtol=1e-2, atol=1e-4)
    assert 0 < told[name]["corrected"] < 0.05 * delta[name].numel()
    assert told["model.layers.0.b.weight"]["corrected"] == 5000  # all of them, which is less than saying which
    assert told["model.embed_tokens.weight"] | {"base_xxh3": 0} == {
        "stored": "whole", "why": "the base's is [40, 8]", "corrected": 0, "base_xxh3": 0
    }  # fmt: skip
    assert told["model.eight"]["why"] == "I8 has no differences"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=9))
def test_any_two_numbers_of_16_bits(tmp_path_factory, patterns):
    from convert.deltas import Entry
    from convert.make_delta import write_delta
    from convert.merge_delta import add, read_corrections

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path_factory.mktemp("bits")
        one, other = (torch.tensor(bits, dtype=torch.int16).view(dtype) for bits in zip(*patterns, strict=True))
        base, target = write_model(folder / "base", {"a": one}), write_model(folder / "target", {"a": other})
        found = {"a": Entry("difference")}
        pairs = {"a": (read_weights(base)["a"], read_weights(target)["a"])}
        for name in ("delta", "merged"):
            (folder / name).mkdir()
        write_delta(folder / "delta", found, pairs)
        pairs = {"a": (pairs["a"][0], read_weights(folder / "delta")["a"])}
        add(folder / "merged", found, pairs, read_corrections(folder / "delta", found, pairs))
        assert torch.equal(bitwise_view(load_file(folder / "merged" / "model.safetensors")["a"]), bitwise_view(other))


def test_a_tuned_model_published_as_a_delta_is_measured_alike(workshop, tuned, script, tmp_path):
    """Tokenizer, config and record travel, no pickle and no checkpoint does, nor where the files were."""
    target = tmp_path / "target"
    shutil.copytree(tuned, target)
    (target / "training_args.bin").write_bytes(b"a pickle")
    assert any(target.glob("checkpoint-*"))
    made(script, workshop / "base", target, tmp_path / "delta")
    merged(script, workshop / "base", tmp_path / "delta", tmp_path / "merged")
    same_bits(weights_of(tmp_path / "merged"), weights_of(tuned))
    results = []
    for folder in (tuned, tmp_path / "merged"):
        where = ("--ckpt_path", folder, "--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json")
        code, _, error = script(test_script.main, *where, "--num_beams", 5, "--metrics", "hit@1,ndcg@5")
        assert code == 0, error
        results.append(json.loads((tmp_path / "r.json").read_text())["all_prompt_results"])
    assert results[0] == results[1]
    for folder in (tmp_path / "delta", tmp_path / "merged"):
        names = {file.name for file in folder.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "reclingua.json"} <= names
        assert not [name for name in names if name.endswith(".bin") or name.startswith("checkpoint") or name[0] == "."]
        assert not any(str(tmp_path.parents[0]) in file.read_text() for file in folder.glob("*.[jm][sd]*"))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("bins", [False, True])
def test_a_delta_of_lc_recs_own(script, tmp_path, architecture, bins):
    """float16, added to a float32 base; .bin shards; embeddings and head whole; frequencies of old checkpoints."""
    base = make_model(architecture, 320, spread=1)
    target = make_model(architecture, 320, spread=1)
    target.resize_token_embeddings(330, mean_resizing=False)
    with torch.no_grad():
        for weight in target.parameters():
            weight += 0.01 * torch.randn_like(weight)
    base.save_pretrained(tmp_path / "base")
    halves = {name: weight.half() for name, weight in base.state_dict().items()}
    delta = {
        name: weight.half() - halves[name] if weight.shape == halves[name].shape else weight.half()
        for name, weight in target.state_dict().items()
    }
    expected = {name: w + halves[name] if w.shape == halves[name].shape else w for name, w in delta.items()}
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    assert "lm_head.weight" in delta  # the tied one, too
    target.half().save_pretrained(tmp_path / "delta")
    shards = {"1": dict(list(delta.items())[:9]), "2": dict(list(delta.items())[9:])}
    if bins:
        (tmp_path / "delta" / "model.safetensors").unlink()
        for number, tensors in shards.items():
            torch.save(tensors, tmp_path / "delta" / f"pytorch_model-{number}.bin")
        file_of = {name: f"pytorch_model-{number}.bin" for number, tensors in shards.items() for name in tensors}
        index = tmp_path / "delta" / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
        (tmp_path / "base" / "model.safetensors").unlink()
        torch.save(base.state_dict(), tmp_path / "base" / "pytorch_model.bin")
    else:
        save_file({k: v.clone() for k, v in delta.items()}, tmp_path / "delta" / "model.safetensors", {"format": "pt"})
    said = merged(script, tmp_path / "base", tmp_path / "delta", tmp_path / "merged", "--low-cpu-mem")
    assert "has no delta.json: the base is not checked, and added in the delta's dtype (F16)" in said
    found = weights_of(tmp_path / "merged")
    if architecture == "llama-tied":
        del expected["lm_head.weight"]
    same_bits(found, expected)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float16)
    assert torch.equal(opened.get_output_embeddings().weight, expected.get("lm_head.weight", opened.lm_head.weight))


def test_a_base_in_another_dtype_or_with_its_head_beside(script, tmp_path):
    """Tuned in float32 from bfloat16, as finetune.py does; a base of more files, .bin, with its tied head."""
    base = make_model("llama-tied", 320, spread=1).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    target = make_model("llama-tied", 320, spread=1)
    with torch.no_grad():
        for weight in target.parameters():
            weight += 0.01 * torch.randn_like(weight)
    target.save_pretrained(tmp_path / "target", max_shard_size="20KB")
    made(script, tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    told = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    assert {entry["stored"] for entry in told.values()} == {"difference"} and "lm_head.weight" not in told
    shutil.copytree(tmp_path / "base", tmp_path / "with-head")
    (tmp_path / "with-head" / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "with-head" / "pytorch_model.bin")
    assert "lm_head.weight" in read_weights(tmp_path / "with-head")
    for name in ("base", "with-head"):
        merged(script, tmp_path / name, tmp_path / "delta", tmp_path / f"merged-{name}")
        same_bits(weights_of(tmp_path / f"merged-{name}"), weights_of(tmp_path / "target"))


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Base and delta of 200 MB in shards of 100 MB: merging takes less than 1.5 shards above what importing does."""
    count = 25 * 10**6
    names = [f"model.layers.{n}.a" for n in range(4)]
    base = write_model(tmp_path / "base", {name: torch.full((count,), 0.5).bfloat16() for name in names}, 10**8)
    shutil.copytree(base, tmp_path / "delta")
    program = """if True:
        import sys
        from bench.common import process_mb
        from convert import merge_delta
        from convert.folders import is_tied
        from pathlib import Path
        base, delta, output = sys.argv[1:]
        is_tied(Path(base))
        before = process_mb("VmRSS")
        sys.argv[1:] = ["--base-model-path", base, "--delta-path", delta, "--target-model-path", output]
        merge_delta.main()
        print(process_mb("VmHWM") - before)
    """
    command = [sys.executable, "-c", program, base, tmp_path / "delta", tmp_path / "merged"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 1.5 * 10**8 / 2**20
    tensor = read_weights(tmp_path / "merged")[names[3]]
    assert torch.equal(tensor.read(10, 20), torch.ones(10).bfloat16())


def test_pieces_of_two_tensors(tmp_path):
    """Of other sizes: each comes whole, the checksum at the end, whoever listens no further."""
    stored = read_weights(write_model(tmp_path / "model", {"one": torch.randn(9, 2), "other": torch.randn(50)}))
    one, other = stored["one"], stored["other"]
    pieces = list(paired_chunks({"a": (one, other), "b": (None, other)}))
    assert [piece.name for piece in pieces] == ["a", "b"] and pieces[1].base is None
    assert torch.equal(pieces[0].base, one.read()) and torch.equal(pieces[0].other, other.read())
    (reverse,) = paired_chunks({"a": (other, one)})
    assert len(pieces[0].checksum) == len(reverse.checksum) == 32 and pieces[0].checksum != reverse.checksum
    next(paired_chunks({"a": (one, other)} | {str(n): (one, other) for n in range(50)}))


def test_a_writer_that_is_not_given_all(tmp_path):
    with pytest.raises(ValueError, match="b: 2 of its elements have not been written"):
        with Writer(tmp_path, plan({"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (4,))})) as writer:
            writer.put("a", torch.ones(2, dtype=torch.float64))
            writer.put("b", torch.ones(2), start=2)
