"""Merged LoRA weights: the same predictions from an ordinary model folder, and bad input."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import finetune
import pretrain
import test as test_script
from convert import merge_lora
from reclingua.inference.loading import load_language_model, load_metadata
from reclingua.models import registry
from reclingua.models.language import base_fingerprint, load_model
from reclingua.models.lora import load_lora
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.models import make_model
from tests.helpers.scripts import flags, run_main
from tests.helpers.toys import write_preferences
from tests.methods.test_lora import LEARN, adapted

pytestmark = pytest.mark.slow

FEW = ("--max_steps", 4, "--save_and_eval_strategy", "no")


def merge(script, adapter, output, *more):
    code, out, error = script(merge_lora.main, "--ckpt_path", adapter, "--output_dir", output, *more)
    assert code == 0, error
    return out


@pytest.fixture(scope="session")
def few_steps(workshop):
    """Adapter after a few steps with a high learning rate, which change the predictions."""
    run_main(finetune.main, *flags(workshop, workshop / "few", *LEARN, *FEW, "--learning_rate", 3e-2))
    return workshop / "few"


@pytest.fixture(scope="session")
def liked(workshop):
    """Ratings dataset, and checkpoints of tallrec and binllm."""
    root = workshop / "preferences"
    write_preferences(root)
    data = ("--dataset", "liked", "--data_path", root)
    size = ("--embedding_size", 16, "--epochs", 60, "--results_file", root / "hash.json")
    run_main(pretrain.main, "--model", "hash", *data, "--output_dir", root / "hash", *size)
    for method, more in (("tallrec", ()), ("binllm", ("--cf_model", root / "hash"))):
        base = ("--method", method, "--base_model", workshop / "base", "--output_dir", root / method)
        run_main(finetune.main, *data, *base, *FEW, "--learning_rate", 3e-2, "--max_his_len", 4, "--use_cpu", *more)
    return root


def read_predictions(script, folder, data_path, output, *more):
    paths = ("--ckpt_path", folder, "--data_path", data_path, "--results_file", output / "results.json")
    code, _, error = script(test_script.main, *paths, "--predictions_file", output / "lines.jsonl", *more)
    assert code == 0, error
    return [json.loads(line) for line in (output / "lines.jsonl").read_text().splitlines()]


def test_a_merged_adapter_has_the_same_predictions(workshop, few_steps, script, tmp_path):
    merge(script, few_steps, tmp_path / "merged")
    metadata = load_metadata(tmp_path / "merged")
    assert metadata.lora is None and metadata.base_model == "base"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    adapter, _ = load_language_model(few_steps, load_metadata(few_steps), "cpu")
    merged, _ = load_language_model(tmp_path / "merged", metadata, "cpu")
    ids = torch.arange(4, 200, 3)[None]
    with torch.no_grad():
        merged_logits, adapter_logits = merged(input_ids=ids).logits, adapter(input_ids=ids).logits
        with adapter.disable_adapter():
            base_logits = adapter(input_ids=ids).logits
    torch.testing.assert_close(merged_logits, adapter_logits, atol=2e-4, rtol=1e-4)
    assert (merged_logits - base_logits).abs().max() > 0.1
    beams = ("--num_beams", 9, "--metrics", "hit@1")
    folders = (few_steps, tmp_path / "merged")
    before, after = (read_predictions(script, folder, workshop / "datasets", tmp_path, *beams) for folder in folders)
    assert [line["items"][0] for line in before] == [line["items"][0] for line in after]
    small = tmp_path / "small"
    merge(script, few_steps, small, "--dtype", "bfloat16")
    assert {weight.dtype for weight in load_model(small, dtype="auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_rows_of_semantic_id_tokens_are_merged(toy, tmp_path, script, architecture):
    """Tied embeddings stay tied; an untied head has rows of its own."""
    model, tokenizer, ids = adapted(toy, architecture)
    make_model(architecture, len(tokenizer) - len(ids), spread=1).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    base = load_model(tmp_path / "base")
    base_model, lora = str(tmp_path / "base"), {"rank": 4}
    metadata = CheckpointMetadata("lcrec", "toy", base_model, base_sha256=base_fingerprint(base_model), lora=lora)
    metadata.save(tmp_path / "adapter")
    merge(script, tmp_path / "adapter", tmp_path / "merged")
    adapter, merged = load_lora(base, tokenizer, tmp_path / "adapter").eval(), load_model(tmp_path / "merged").eval()
    prompt = torch.tensor([[5, ids[2], 9, ids[4]]])
    with torch.no_grad():
        actual, expected = (model(input_ids=prompt).logits[..., ids] for model in (merged, adapter))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == merged.config.tie_word_embeddings


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_a_quantized_base_is_merged_in_full_precision(workshop, script, tmp_path, bits):
    """The merged model equals the adapter on the base in full precision."""
    more = ("--lora_target_modules", "q_proj,v_proj", *FEW, "--learning_rate", 1e-2, bits)
    code, _, error = script(finetune.main, *flags(workshop, tmp_path / "out", *LEARN, *more))
    assert code == 0, error
    merge(script, tmp_path / "out", tmp_path / "merged")
    metadata = load_metadata(tmp_path / "merged")
    assert not (metadata.lora or metadata.load_in_4bit or metadata.load_in_8bit)
    merged, tokenizer = load_language_model(tmp_path / "merged", metadata, "cpu")
    full = load_lora(load_model(workshop / "base"), tokenizer, tmp_path / "out").eval()
    ids = torch.arange(4, 200, 3)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, full(input_ids=ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["tallrec", "binllm"])
def test_yes_no_models(liked, script, tmp_path, method):
    assert "merged into" in merge(script, liked / method, tmp_path / "merged")
    model = registry.load_yes_no_model(tmp_path / "merged", method)
    assert not model.config.lora and not any("lora" in name for name in model.state_dict())
    shutil.move(liked / "hash", liked / "moved")  # the merged folder is self-contained
    merged = read_predictions(script, tmp_path / "merged", liked, tmp_path)
    shutil.move(liked / "moved", liked / "hash")
    before = read_predictions(script, liked / method, liked, tmp_path)
    scores, others = (torch.tensor([line["score"] for line in lines]) for lines in (merged, before))
    torch.testing.assert_close(scores, others, atol=1e-3, rtol=1e-4)
    assert not any(str(liked.parent) in file.read_text() for file in (tmp_path / "merged").glob("*.json"))


def test_bad_input(workshop, tuned, few_steps, liked, refused, tmp_path):
    def refuse(adapter, *more):
        line = refused(merge_lora.main, "--ckpt_path", adapter, "--output_dir", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return line

    make_model("llama", 320, spread=1).save_pretrained(tmp_path / "other")
    assert "is not the base model that" in refuse(few_steps, "--base_model", tmp_path / "other")
    assert "no causal language model" in refuse(few_steps, "--base_model", tmp_path)
    assert "it is a complete model already" in refuse(tuned)
    assert "was not tuned by finetune.py" in refuse(liked / "hash")
    assert "no such file; it should contain the metadata" in refuse(workshop / "base")
    assert "no such folder" in refuse(tmp_path / "none")
    broken = shutil.copytree(few_steps, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "no adapter for" in refuse(broken)
    replace(load_metadata(broken), base_sha256=None).save(broken)
    assert "by another version of finetune.py" in refuse(broken)
    broken = shutil.copytree(liked / "tallrec", tmp_path / "cut")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "its weights cannot be read" in refuse(broken)
