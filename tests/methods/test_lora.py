"""LC-Rec with LoRA: what is trained, what is saved, and that a reloaded adapter is the model that was tuned."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional

import finetune
import test as test_script
from reclingua.datasets.collators import IGNORE
from reclingua.datasets.interactions import open_interactions
from reclingua.inference.loading import load_language_model, load_metadata
from reclingua.models.chunked_loss import ChunkedCrossEntropy
from reclingua.models.language import load_model
from reclingua.models.lora import add_lora_adapter, load_lora
from reclingua.models.vocabulary import code_tokens, extend_vocabulary
from tests.helpers.models import ARCHITECTURES, make_model, make_tokenizer
from tests.helpers.scripts import flags, run_main

pytestmark = pytest.mark.slow

LEARN = ("--lora", "--lora_r", 32, "--lora_alpha", 64, "--learning_rate", 3e-3, "--epochs", 2)
LEARN += ("--targets", "all", "--his_sep", "")


def adapted(toy, architecture, dtype=torch.float32):
    """A tiny model with LoRA weights and rows for code tokens, none of which are zero; its tokenizer."""
    tokenizer = make_tokenizer(bos=False)
    model = make_model(architecture, len(tokenizer), spread=1).to(dtype)
    index = open_interactions(toy, "toy", ["index"]).index
    extend_vocabulary(model, tokenizer, index)
    ids = tokenizer.convert_tokens_to_ids(code_tokens(index))
    model = add_lora_adapter(model, ids, rank=4, alpha=8, dropout=0.0, targets=["all-linear"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                weight.normal_(std=0.5)
    return model, tokenizer, ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_tokens_and_low_rank_weights_alone_are_trained(toy, architecture, dtype):
    model, tokenizer, ids = adapted(toy, architecture, dtype)
    base = model.get_base_model()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name or "trainable_tokens_delta" in name for name in trained)
    assert all(weight.dtype == torch.float32 for weight in model.parameters() if weight.requires_grad)
    tied = make_model(architecture, 400).config.tie_word_embeddings
    assert sum("trainable_tokens_delta" in name for name in trained) == (1 if tied else 2)
    frozen = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    labels = torch.tensor([[IGNORE, 5, ids[0], ids[1], tokenizer.eos_token_id]])
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(input_ids=labels.clamp(min=0), labels=labels).loss.backward()
    optimizer.step()
    assert all(torch.equal(weight, frozen[name]) for name, weight in model.named_parameters() if name in frozen)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert torch.equal(embedding, head) == tied


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2"])
def test_the_loss_of_the_labels_is_the_models_own(toy, architecture):
    model, _, ids = adapted(toy, architecture)
    model.eval()  # GPT-2 has dropout
    labels = torch.tensor([[IGNORE, IGNORE, ids[0], IGNORE, ids[3], ids[1]]])
    inputs = torch.tensor([[7, 8, ids[0], 9, ids[3], ids[1]]])

    def gradients():
        found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        model.zero_grad()
        return found

    logits = model(input_ids=inputs).logits
    plain = functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    plain.backward()
    expected = gradients()
    chunked_loss = ChunkedCrossEntropy(model, max_logits_mb=1)
    with chunked_loss.at_labels(labels):
        model(input_ids=inputs)
    chunked_loss.loss.backward()
    found = gradients()
    torch.testing.assert_close(chunked_loss.loss, plain)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_comes_back_as_it_was(toy, tmp_path, architecture):
    """From a base model that has never heard of the code tokens; and it holds no embedding but theirs."""
    model, tokenizer, ids = adapted(toy, architecture)
    make_model(architecture, len(make_tokenizer(bos=False)), spread=1).save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        rows = [file.get_tensor(name) for name in file.keys() if "lora_" not in name]
    tied = make_model(architecture, 400).config.tie_word_embeddings
    assert [len(weight) for weight in rows] == [len(ids)] * (1 if tied else 2)
    again = load_lora(load_model(tmp_path / "base"), tokenizer, tmp_path / "adapter")
    prompt = torch.tensor([[5, ids[2], 9, ids[4]]])
    with torch.no_grad():
        ours, theirs = (each.eval()(input_ids=prompt).logits[..., ids] for each in (again, model))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def results_of(folder, workshop, script, *more):
    where = ("--ckpt_path", folder, "--data_path", workshop / "datasets", "--results_file", folder / "results.json")
    code, _, error = script(test_script.main, *where, "--num_beams", 5, "--metrics", "hit@1,ndcg@5", *more)
    assert code == 0, error
    return json.loads((folder / "results.json").read_text())["mean_results"]


@pytest.fixture(scope="session")
def lora(workshop):
    how = ("--epochs", 20, "--max_his_len", 3, "--save_and_eval_strategy", "steps", "--save_steps", 65)
    how += ("--save_total_limit", 5)
    run_main(finetune.main, *flags(workshop, workshop / "lora", *LEARN, *how))
    return workshop / "lora"


def test_a_tuned_adapter_is_measured_as_it_was_before_it_was_saved(workshop, lora, script, refused, tmp_path):
    assert not (lora / "model.safetensors").exists()
    found = results_of(lora, workshop, script, "--lora", "--base_model", workshop / "base")
    assert found["hit@1"] > 0.9  # the ring is learned

    # Without everyone's last item, the test is what valid was. An early checkpoint, whose figures are not all 1.
    shutil.copytree(workshop / "datasets" / "toy", tmp_path / "datasets" / "toy")
    histories = tmp_path / "datasets" / "toy" / "toy.inter.json"
    histories.write_text(json.dumps({u: items[:-1] for u, items in json.loads(histories.read_text()).items()}))
    run, early = json.loads((lora / "run.json").read_text()), shutil.copytree(lora, tmp_path / "early")
    first = next(line for line in run["log"] if "eval_ndcg@10" in line)
    shutil.copytree(lora / f"checkpoint-{first['step']}", early, dirs_exist_ok=True)
    where = ("--data_path", tmp_path / "datasets", "--num_beams", 10, "--metrics", "hit@10,ndcg@10")
    assert results_of(early, workshop, script, *where)["ndcg@10"] == first["eval_ndcg@10"] < 1

    # The base model has moved; the adapter still finds it where it is told.
    moved = tmp_path / "moved"
    shutil.copytree(lora, moved)
    record = json.loads((moved / "reclingua.json").read_text())
    (moved / "reclingua.json").write_text(json.dumps(record | {"base_model": str(tmp_path / "gone")}))
    assert results_of(moved, workshop, script, "--base_model", workshop / "base") == found
    where = ("--ckpt_path", moved, "--data_path", workshop / "datasets")
    assert "name the base model of" in refused(test_script.main, *where)
    make_model("llama", 320, spread=1).save_pretrained(tmp_path / "other")
    assert "is not the base model that" in refused(test_script.main, *where, "--base_model", tmp_path / "other")


@pytest.mark.parametrize("how", ["--load_in_4bit", "--load_in_8bit", "--gradient_checkpointing"])
def test_other_ways_to_hold_the_base_model(workshop, script, tmp_path, how):
    out = tmp_path / "out"
    quick = ("--lora_target_modules", "q_proj,v_proj", "--max_steps", 4, "--save_and_eval_strategy", "no")
    code, _, error = script(finetune.main, *flags(workshop, out, *LEARN, *quick, how))
    assert code == 0, error
    assert set(results_of(out, workshop, script)) == {"hit@1", "ndcg@5"}
    model, _ = load_language_model(out, load_metadata(out), torch.device("cpu"))
    kinds = {type(module).__name__ for module in model.modules()}
    assert ("Linear4bit" in kinds, "Linear8bitLt" in kinds) == (how == "--load_in_4bit", how == "--load_in_8bit")


def test_a_stopped_run_goes_on(workshop, script, tmp_path):
    """Two epochs, or one and then one more after a resume: the same weights."""
    saves = ("--save_and_eval_strategy", "epoch", "--save_total_limit", 5, "--load_best_model_at_end", "False")
    whole, half = tmp_path / "whole", tmp_path / "half"
    run_main(finetune.main, *flags(workshop, whole, *LEARN, *saves))
    first = min(whole.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    shutil.copytree(first, half / first.name)
    run_main(finetune.main, *flags(workshop, half, *LEARN, *saves, "--resume_from_checkpoint", "auto"))
    with (
        safe_open(whole / "adapter_model.safetensors", "pt") as one,
        safe_open(half / "adapter_model.safetensors", "pt") as other,
    ):
        for key in one.keys():
            torch.testing.assert_close(one.get_tensor(key), other.get_tensor(key), rtol=0, atol=0)


def test_bad_input(workshop, tmp_path, lora, refused):
    def refuse(*more):
        return refused(finetune.main, *flags(workshop, tmp_path / "out", *more))

    assert "give --lora" in refuse("--load_in_4bit")
    assert "--lora_r has no effect" in refuse("--lora_r", 4)
    assert "is an adapter, not a model" in refuse("--lora", "--base_model", lora)
    assert "holds a model of an earlier run" in refused(finetune.main, *flags(workshop, lora, "--lora"))
    assert "one of them" in refuse("--lora", "--load_in_4bit", "--load_in_8bit")
    assert "this model has no layer 'query'" in refuse("--lora", "--lora_target_modules", "query")
    assert "--lora_r should be 1 at least" in refuse("--lora", "--lora_r", 0)
    broken = tmp_path / "broken"
    shutil.copytree(lora, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    where = ("--ckpt_path", broken, "--data_path", workshop / "datasets")
    assert "no adapter for" in refused(test_script.main, *where)
    assert "no causal language model" in refused(test_script.main, *where, "--base_model", tmp_path)
