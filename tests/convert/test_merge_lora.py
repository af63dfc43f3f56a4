"""LoRA weights merged into their base model: the same answers from an ordinary folder, and what is refused."""

import json
import shutil

import pytest
import torch

import finetune
import pretrain
import test as test_script
from convert import merge_lora
from reclingua.inference import loading
from reclingua.models import registry
from reclingua.models.language import base_fingerprint, load_model
from reclingua.models.lora import load_lora
from tests.helpers.models import make_model
from tests.helpers.scripts import flags, run_main
from tests.helpers.toys import write_preferences
from tests.methods.test_lora import LEARN, adapted

FEW = ("--max_steps", 4, "--save_and_eval_strategy", "no")


def merge(script, adapter, output, *more):
    code, said, error = script(merge_lora.main, "--ckpt_path", adapter, "--output_dir", output, *more)
    assert code == 0, error
    return said


@pytest.fixture(scope="session")
def few_steps(workshop):
    """An adapter after a few steps, which have changed the answers."""
    run_main(finetune.main, *flags(workshop, workshop / "few", *LEARN, *FEW, "--learning_rate", 3e-2))
    return workshop / "few"


@pytest.fixture(scope="session")
def liked(workshop):
    """Preference data, and folders of tallrec and binllm."""
    root = workshop / "preferences"
    write_preferences(root)
    where = ("--dataset", "liked", "--data_path", root)
    size = ("--embedding_size", 16, "--epochs", 60, "--results_file", root / "hash.json")
    run_main(pretrain.main, "--model", "hash", *where, "--output_dir", root / "hash", *size)
    for method, more in (("tallrec", ()), ("binllm", ("--cf_model", root / "hash"))):
        base = ("--method", method, "--base_model", workshop / "base", "--output_dir", root / method)
        run_main(finetune.main, *where, *base, *FEW, "--learning_rate", 3e-2, "--max_his_len", 4, "--use_cpu", *more)
    return root


def results_of(script, folder, data_path, output, *more):
    where = ("--ckpt_path", folder, "--data_path", data_path, "--results_file", output / "results.json")
    code, _, error = script(test_script.main, *where, "--predictions_file", output / "lines.jsonl", *more)
    assert code == 0, error
    return [json.loads(line) for line in (output / "lines.jsonl").read_text().splitlines()]


def test_a_merged_adapter_answers_alike(workshop, few_steps, script, tmp_path):
    merge(script, few_steps, tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "reclingua.json").read_text())
    assert record["lora"] is None and record["base_model"] == "base"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    before, _ = loading.open_model(few_steps, json.loads((few_steps / "reclingua.json").read_text()), "cpu")
    merged, _ = loading.open_model(tmp_path / "merged", record, "cpu")
    ids = torch.arange(4, 200, 3)[None]
    with torch.no_grad():
        ours, theirs = merged(input_ids=ids).logits, before(input_ids=ids).logits
        with before.disable_adapter():
            without = before(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    assert (ours - without).abs().max() > 0.1
    beams = ("--num_beams", 9, "--metrics", "hit@1")
    folders = (few_steps, tmp_path / "merged")
    one, other = (results_of(script, folder, workshop / "datasets", tmp_path, *beams) for folder in folders)
    assert [line["items"][0] for line in one] == [line["items"][0] for line in other]
    small = tmp_path / "small"
    merge(script, few_steps, small, "--dtype", "bfloat16")
    assert {weight.dtype for weight in load_model(small, dtype="auto").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_rows_of_code_tokens_too(toy, tmp_path, script, architecture):
    """Tied embeddings stay tied; a head of its own has its own rows."""
    model, tokenizer, ids = adapted(toy, architecture)
    make_model(architecture, len(tokenizer) - len(ids), spread=1).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    base = load_model(tmp_path / "base")
    record = {"method": "lcrec", "lora": {"rank": 4}, "base_model": str(tmp_path / "base"), "base_dtype": "float32"}
    record |= {"load_in_4bit": False, "load_in_8bit": False, "base_sha256": base_fingerprint(base)}
    (tmp_path / "adapter" / "reclingua.json").write_text(json.dumps(record))
    merge(script, tmp_path / "adapter", tmp_path / "merged")
    again, merged = load_lora(base, tokenizer, tmp_path / "adapter").eval(), load_model(tmp_path / "merged")
    prompt = torch.tensor([[5, ids[2], 9, ids[4]]])
    with torch.no_grad():
        ours, theirs = (each(input_ids=prompt).logits[..., ids] for each in (merged.eval(), again))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == merged.config.tie_word_embeddings


@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_over_a_base_in_few_bits(workshop, script, tmp_path, bits):
    """It goes into the base in full precision: near the tuned model, no further from it than the rounding is."""
    more = ("--lora_target_modules", "q_proj,v_proj", *FEW, "--learning_rate", 1e-2, bits)
    code, _, error = script(finetune.main, *flags(workshop, tmp_path / "out", *LEARN, *more))
    assert code == 0, error
    merge(script, tmp_path / "out", tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "reclingua.json").read_text())
    assert not (record["lora"] or record["load_in_4bit"] or record["load_in_8bit"])
    merged, tokenizer = loading.open_model(tmp_path / "merged", record, "cpu")
    full = load_lora(load_model(workshop / "base"), tokenizer, tmp_path / "out").eval()
    ids = torch.arange(4, 200, 3)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, full(input_ids=ids).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["tallrec", "binllm"])
def test_answers_of_yes_and_no(liked, script, tmp_path, method):
    said = merge(script, liked / method, tmp_path / "merged")
    assert "merged into" in said
    model = registry.load_yes_no_model(tmp_path / "merged", method)
    assert not model.config.lora and not any("lora" in name for name in model.state_dict())
    shutil.move(liked / "hash", liked / "moved")  # the folder holds all it needs
    merged = results_of(script, tmp_path / "merged", liked, tmp_path)
    shutil.move(liked / "moved", liked / "hash")
    before = results_of(script, liked / method, liked, tmp_path)
    scores, others = (torch.tensor([line["score"] for line in lines]) for lines in (merged, before))
    torch.testing.assert_close(scores, others, atol=1e-3, rtol=1e-4)
    assert not any(str(liked.parent) in file.read_text() for file in (tmp_path / "merged").glob("*.json"))


def test_what_is_refused(workshop, tuned, few_steps, liked, refused, tmp_path):
    def refuse(adapter, *more):
        line = refused(merge_lora.main, "--ckpt_path", adapter, "--output_dir", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return line

    make_model("llama", 320, spread=1).save_pretrained(tmp_path / "other")
    assert "is not the base model that" in refuse(few_steps, "--base_model", tmp_path / "other")
    assert "no causal language model" in refuse(few_steps, "--base_model", tmp_path)
    assert "it is a whole model already" in refuse(tuned)
    assert "was not tuned by finetune.py" in refuse(liked / "hash")
    assert "no such file; it should hold the record" in refuse(workshop / "base")
    assert "no such folder" in refuse(tmp_path / "none")
    broken = shutil.copytree(few_steps, tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    assert "no adapter for" in refuse(broken)
    record = json.loads((broken / "reclingua.json").read_text())
    del record["base_sha256"]
    (broken / "reclingua.json").write_text(json.dumps(record))
    assert "by another version of finetune.py" in refuse(broken)
    broken = shutil.copytree(liked / "tallrec", tmp_path / "cut")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert "its weights do not fit" in refuse(broken)
