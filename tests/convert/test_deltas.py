"""Deltas and their merging: bitwise equality, constant memory, formats of LC-Rec."""

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
from convert.shards import CHUNK_SIZE, Spec, Writer, paired_chunks, plan_shards, read_weights
from tests.helpers.models import make_model
from tests.helpers.weights import assert_same_bits, read_tensors, run_make_delta, run_merge_delta, write_model

HALVES = [torch.float32, torch.bfloat16, torch.float16]
ROOT = Path(__file__).parents[2]


def special(dtype, count):
    """Return random bit patterns: infinities, NaNs with random payloads, subnormal numbers, zeros of both signs."""
    integer = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    generator = torch.Generator().manual_seed(count)
    bits = torch.randint(low, high, (count,), generator=generator, dtype=integer)
    values = bits.view(dtype)
    values[:4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")]).to(dtype)
    return values


@pytest.mark.parametrize("dtype", HALVES)
def test_merged_delta_equals_the_target_bit_by_bit(script, tmp_path, dtype):
    """Tuned weights, random bit patterns, a grown vocabulary, other dtypes, tensors larger than a chunk and empty."""
    generator = torch.Generator().manual_seed(0)

    def near(*shape):
        weight, change = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
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
    assert pairs["model.layers.0.a.weight"][0].numel() > 2 * CHUNK_SIZE
    base = write_model(tmp_path / "base", {name: pair[0] for name, pair in pairs.items()}, shard_bytes=10**5)
    target = write_model(tmp_path / "target", {name: pair[1] for name, pair in pairs.items()}, shard_bytes=10**6)
    run_make_delta(script, base, target, tmp_path / "delta")
    run_merge_delta(script, base, tmp_path / "delta", tmp_path / "merged")
    assert_same_bits(read_tensors(tmp_path / "merged"), read_tensors(target))
    for file in target.glob("model*"):
        assert file.read_bytes() == (tmp_path / "merged" / file.name).read_bytes()  # the same shards

    # Plain addition, as in LC-Rec, restores the target up to rounding.
    delta = read_tensors(tmp_path / "delta")
    entries = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    name = "model.layers.0.a.weight"
    torch.testing.assert_close(pairs[name][0] + delta[name], pairs[name][1], rtol=1e-2, atol=1e-4)
    assert 0 < entries[name]["corrected"] < 0.05 * delta[name].numel()
    assert entries["model.layers.0.b.weight"]["corrected"] == 5000  # the whole tensor, smaller than with positions
    assert entries["model.embed_tokens.weight"] | {"base_xxh3": 0} == {
        "stored": "whole", "why": "the base's is [40, 8]", "corrected": 0, "base_xxh3": 0
    }  # fmt: skip
    assert entries["model.eight"]["why"] == "I8 has no differences"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-(2**15), 2**15 - 1), st.integers(-(2**15), 2**15 - 1)), min_size=1, max_size=9))
def test_any_two_numbers_of_16_bits(tmp_path_factory, patterns):
    from convert.deltas import Entry
    from convert.make_delta import write_delta
    from convert.merge_delta import add, read_corrections

    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path_factory.mktemp("bits")
        first, second = (torch.tensor(bits, dtype=torch.int16).view(dtype) for bits in zip(*patterns, strict=True))
        base, target = write_model(folder / "base", {"a": first}), write_model(folder / "target", {"a": second})
        entries = {"a": Entry("difference")}
        pairs = {"a": (read_weights(base)["a"], read_weights(target)["a"])}
        for name in ("delta", "merged"):
            (folder / name).mkdir()
        write_delta(folder / "delta", entries, pairs)
        pairs = {"a": (pairs["a"][0], read_weights(folder / "delta")["a"])}
        add(folder / "merged", entries, pairs, read_corrections(folder / "delta", entries, pairs))
        merged = load_file(folder / "merged" / "model.safetensors")["a"]
        assert torch.equal(bitwise_view(merged), bitwise_view(second))


def test_a_merged_delta_has_the_same_results(workshop, tuned, script, tmp_path):
    """Tokenizer, config and metadata are copied, pickles, checkpoints and local paths are not."""
    target = tmp_path / "target"
    shutil.copytree(tuned, target)
    (target / "training_args.bin").write_bytes(b"a pickle")
    (tmp_path / "private.txt").write_text("private")
    for name in ("notes.json", "notes.txt", "users.index.json"):
        (target / name).symlink_to(tmp_path / "private.txt")
    (target / "password.json").write_text("private")
    assert any(target.glob("checkpoint-*"))
    run_make_delta(script, workshop / "base", target, tmp_path / "delta")
    run_merge_delta(script, workshop / "base", tmp_path / "delta", tmp_path / "merged")
    assert_same_bits(read_tensors(tmp_path / "merged"), read_tensors(tuned))
    results = []
    for folder in (tuned, tmp_path / "merged"):
        paths = ("--ckpt_path", folder, "--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json")
        code, _, error = script(test_script.main, *paths, "--num_beams", 5, "--metrics", "hit@1,ndcg@5")
        assert code == 0, error
        results.append(json.loads((tmp_path / "r.json").read_text())["all_prompt_results"])
    assert results[0] == results[1]
    for folder in (tmp_path / "delta", tmp_path / "merged"):
        names = {file.name for file in folder.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "reclingua.json"} <= names
        assert not any("notes" in name or "password" in name for name in names)
        assert not [name for name in names if name.endswith(".bin") or name.startswith("checkpoint") or name[0] == "."]
        assert not any(str(tmp_path.parents[0]) in file.read_text() for file in folder.glob("*.[jm][sd]*"))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
@pytest.mark.parametrize("bins", [False, True])
def test_a_delta_in_the_format_of_lc_rec(script, tmp_path, architecture, bins):
    """float16, added to a float32 base; .bin shards; whole embeddings and head; rotary frequencies."""
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
    assert "lm_head.weight" in delta  # also if it is tied
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
    out = run_merge_delta(script, tmp_path / "base", tmp_path / "delta", tmp_path / "merged", "--low-cpu-mem")
    assert "has no delta.json: the base is not checked, and added in the delta's dtype (F16)" in out
    if architecture == "llama-tied":
        del expected["lm_head.weight"]
    assert_same_bits(read_tensors(tmp_path / "merged"), expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float16)
    assert torch.equal(model.get_output_embeddings().weight, expected.get("lm_head.weight", model.lm_head.weight))


def test_a_base_in_another_dtype_or_with_a_stored_tied_head(script, tmp_path):
    """Tuned in float32 from bfloat16, as by finetune.py; a base in .bin format that includes its tied head."""
    base = make_model("llama-tied", 320, spread=1).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    target = make_model("llama-tied", 320, spread=1)
    with torch.no_grad():
        for weight in target.parameters():
            weight += 0.01 * torch.randn_like(weight)
    target.save_pretrained(tmp_path / "target", max_shard_size="20KB")
    run_make_delta(script, tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    entries = json.loads((tmp_path / "delta" / "delta.json").read_text())["tensors"]
    assert {entry["stored"] for entry in entries.values()} == {"difference"} and "lm_head.weight" not in entries
    shutil.copytree(tmp_path / "base", tmp_path / "with-head")
    (tmp_path / "with-head" / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "with-head" / "pytorch_model.bin")
    assert "lm_head.weight" in read_weights(tmp_path / "with-head")
    for name in ("base", "with-head"):
        run_merge_delta(script, tmp_path / name, tmp_path / "delta", tmp_path / f"merged-{name}")
        assert_same_bits(read_tensors(tmp_path / f"merged-{name}"), read_tensors(tmp_path / "target"))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Base and delta of 200 MB in shards of 100 MB: merging needs less than 1.5 shards beyond the imports."""
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


def test_chunks_of_tensors_of_different_sizes(tmp_path):
    """Both tensors are complete, the last chunk has the checksum, and the generator can be abandoned."""
    stored = read_weights(write_model(tmp_path / "model", {"small": torch.randn(9, 2), "large": torch.randn(50)}))
    small, large = stored["small"], stored["large"]
    chunks = list(paired_chunks({"a": (small, large), "b": (None, large)}))
    assert [chunk.name for chunk in chunks] == ["a", "b"] and chunks[1].base is None
    assert torch.equal(chunks[0].base, small.read()) and torch.equal(chunks[0].other, large.read())
    (reverse,) = paired_chunks({"a": (large, small)})
    assert len(chunks[0].checksum) == len(reverse.checksum) == 32 and chunks[0].checksum != reverse.checksum
    next(paired_chunks({"a": (small, large)} | {str(n): (small, large) for n in range(50)}))


def test_a_writer_without_all_elements(tmp_path):
    with pytest.raises(ValueError, match="b: 2 of its elements have not been written"):
        with Writer(tmp_path, plan_shards({"a": Spec(torch.float32, (2,)), "b": Spec(torch.float32, (4,))})) as writer:
            writer.put("a", torch.ones(2, dtype=torch.float64))
            writer.put("b", torch.ones(2), start=2)
