"""finetune.py and test.py from flags to files: they learn, resume, agree with each other, and refuse bad input."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import finetune
import test as test_script
from convert import scratch
from reclingua.methods import METHODS
from reclingua.methods.yes_no import CF_METHODS
from reclingua.reporting.console import print_users
from reclingua.training.arguments import (
    Arguments,
    DataArguments,
    LoraArguments,
    MethodArguments,
    ModelArguments,
    TuningArguments,
    YesNoArguments,
    parse,
)
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.models import make_model, make_tokenizer
from tests.helpers.scripts import SPARSE, flags, run_main

CONFIGS = Path(__file__).parents[2] / "config"


def save_base(folder, architecture="llama-tied", bos=False):
    """A base model of the given architecture with small random weights."""
    tokenizer = make_tokenizer(bos)
    model = make_model(architecture, len(tokenizer), spread=1)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def measure(script, workshop, ckpt, *more):
    results = workshop / "results.json"
    code, out, error = script(
        test_script.main, "--ckpt_path", ckpt, "--data_path", workshop / "datasets", "--num_beams", 5,
        "--metrics", "hit@1,hit@5,ndcg@5", "--results_file", results, *more,
    )  # fmt: skip
    assert code == 0, error
    return json.loads(results.read_text()), out


def test_history_learns_the_ring(script, workshop, tuned):
    results, out = measure(script, workshop, tuned, "--exclude_seen", "--test_prompt_ids", "all")
    assert results["mean_results"]["hit@1"] > 0.9
    assert results["users"] == 60 and results["baselines"]["popularity"]["hit@1"] < 0.5
    assert results["test_prompt_ids"] == [0, 1, 2, 3] == list(range(len(results["all_prompt_results"])))
    assert results["min_results"]["hit@1"] <= results["mean_results"]["hit@1"] <= results["max_results"]["hit@1"]
    assert "Toy number" in out and "co-occurrence" in out


@pytest.mark.slow
def test_next_learns_the_ring(script, workshop, tmp_path):
    more = ("--epochs", 25, "--max_his_len", 3, "--prompt_file", one_template(tmp_path), *SPARSE)
    code, out, error = script(finetune.main, *flags(workshop, tmp_path / "out", *more))
    assert code == 0, error
    results, _ = measure(script, workshop, tmp_path / "out")
    assert results["mean_results"]["hit@1"] > 0.9


def one_template(folder):
    path = folder / "prompts.yaml"
    path.write_text(
        "seqrec: [{prompt: 'a user had {history}. Response: ', response: '{target}'}]\n"
        "seqrec_history: [{prompt: 'user {history}'}]\n"
    )
    return path


def test_predictions_repeat_the_results(script, workshop, tuned):
    lines = workshop / "predictions.jsonl"
    results, _ = measure(script, workshop, tuned, "--exclude_seen", "--predictions_file", lines)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    inter = json.loads((workshop / "datasets/toy/toy.inter.json").read_text())
    index = json.loads((workshop / "datasets/toy/toy.index.json").read_text())
    assert len(rows) == 60
    assert sum(row["target"] in row["items"][:5] for row in rows) / 60 == results["mean_results"]["hit@5"]
    for row in rows:
        history = [str(item) for item in inter[row["user"]]]
        assert row["target"] == history[-1] and not set(row["items"]) & set(history[:-1])
        assert len(set(row["items"])) == len(row["items"]) == len(row["scores"])
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["indices"] == ["".join(index[item]) for item in row["items"]]


def test_the_batch_size_of_the_search_changes_nothing(script, workshop, tuned):
    one, _ = measure(script, workshop, tuned, "--test_batch_size", 1)
    many, _ = measure(script, workshop, tuned, "--test_batch_size", 64)
    assert one["mean_results"] == many["mean_results"]


def test_a_checkpoint_tells_how_it_was_made(tuned):
    run = json.loads((tuned / "run.json").read_text())
    assert run["arguments"]["targets"] == "all" and run["seed"] == 42 and run["seconds"] > 0
    assert run["versions"]["torch"] == torch.__version__
    assert json.loads((tuned / METADATA_FILE).read_text())["dataset"] == "toy"
    assert not list(tuned.rglob("training_args.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("architecture, bos", [("gpt2", False), ("qwen3", True), ("mistral", True), ("llama", False)])
def test_other_architectures_train_save_and_test(script, workshop, tmp_path, architecture, bos):
    base = save_base(tmp_path / "base", architecture, bos)
    code, _, error = script(
        finetune.main,
        *flags(workshop, tmp_path / "out", "--base_model", base, "--max_steps", 6, "--save_strategy", "no"),
        *("--embedding_dropout", 0.1),
    )
    assert code == 0, error
    results, _ = measure(script, workshop, tmp_path / "out", "--sample_num", 4)
    assert results["users"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "batches",
    [
        ("--epochs", 4),
        ("--epochs", 9, "--max_tokens_per_batch", 250, "--gradient_accumulation_steps", 2),
        ("--epochs", 4, "--max_tokens_per_batch", 300, "--packing"),
    ],
    ids=["samples", "tokens", "packed"],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(script, workshop, tmp_path, batches):
    more = ("--targets", "all", *batches, "--save_steps", 10, "--save_and_eval_strategy", "steps")
    more += ("--load_best_model_at_end", "False", "--save_total_limit", 9, "--resume_from_checkpoint", "auto")
    assert script(finetune.main, *flags(workshop, tmp_path / "whole", *more))[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    steps = sorted(int(folder.name[11:]) for folder in (tmp_path / "cut").glob("checkpoint-*"))
    assert steps[:3] == [10, 20, 30]
    for step in steps[1:]:
        shutil.rmtree(tmp_path / f"cut/checkpoint-{step}")
    (tmp_path / "cut/model.safetensors").unlink()
    (tmp_path / "cut/checkpoint-99").mkdir()  # killed while it was written
    code, out, error = script(finetune.main, *flags(workshop, tmp_path / "cut", *more))
    assert code == 0 and "resuming from" in out and "checkpoint-10" in out, error
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_earlier_run_is_neither_overwritten_nor_mixed_up(workshop, tuned, refused):
    before = (tuned / "model.safetensors").read_bytes()
    assert "of an earlier run" in refused(finetune.main, *flags(workshop, tuned))
    resumed = ("--resume_from_checkpoint", "auto", "--targets", "all", "--max_his_len", 7)
    assert "with another max_his_len" in refused(finetune.main, *flags(workshop, tuned, *resumed))
    assert (tuned / "model.safetensors").read_bytes() == before


def test_bad_input_of_finetune(workshop, tmp_path, refused):
    def refuse(*more):
        return refused(finetune.main, *flags(workshop, tmp_path / "out", *more))

    assert "--base_model is required" in refused(finetune.main, "--output_dir", tmp_path / "out")
    assert "no such dataset folder" in refuse("--dataset", "nothing")
    assert "no tokenizer could be loaded" in refuse("--base_model", tmp_path)
    assert "--tasks 'cooking'" in refuse("--tasks", "cooking")
    assert "one whole number for each" in refuse("--train_prompt_sample_num", "1,1")
    assert "no such prompt file" in refuse("--prompt_file", tmp_path / "no.yaml")
    assert "no such preset" in refuse("--config", tmp_path / "no.yaml")
    assert "No such file" in refuse("--accelerator_config", tmp_path / "no.json")
    assert "cannot be written" in refuse("--output_dir", "/proc/self/out")
    assert "is both --base_model and --output_dir" in refuse("--output_dir", workshop / "base")
    assert "--max_his_len 0" in refuse("--max_his_len", 0)
    assert "--embedding_dropout 1.0: should be from 0" in refuse("--embedding_dropout", 1)
    assert "should be hit@10, ndcg@10 or loss" in refuse("--metric_for_best_model", "auc")
    assert "--seed from 0 to below" in refuse("--seed", -1)
    assert "--max_eval_samples should be 0 at least" in refuse("--max_eval_samples", -1)
    (tmp_path / "list.yaml").write_text("- 1")
    assert "should hold 'flag: value' lines" in refuse("--config", tmp_path / "list.yaml")
    small = ("--dataset", "toy", "--data_path", workshop / "datasets", "--output_dir", tmp_path / "small")
    run_main(scratch.main, *small, "--vocab_size", 320, "--max_length", 16)
    assert "reads at most 16 tokens, a sample has" in refuse("--base_model", tmp_path / "small")
    other = tmp_path / "other.json"
    index = json.loads((workshop / "datasets/toy/toy.index.json").read_text())
    other.write_text(json.dumps(index | {"4": ["a", "<b_1>"]}))
    assert "index token 'a' of item '4' is already a word" in refuse("--index_file", other)
    assert not list((tmp_path / "out").glob("*"))


def test_bad_input_of_test(workshop, tuned, tmp_path, refused):
    def refuse(*more):
        where = ("--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json")
        return refused(test_script.main, "--ckpt_path", tuned, *where, *more)

    assert "no such file" in refused(test_script.main, "--ckpt_path", tmp_path)
    assert "no such dataset folder" in refuse("--dataset", "nothing")
    assert "needs lists at least that long" in refuse("--num_beams", 5)
    assert "--test_batch_size 0: should be 1 at least" in refuse("--test_batch_size", 0)
    assert "should be hit@k" in refuse("--metrics", "auc")
    assert "of 0, 1, 2, 3" in refuse("--test_prompt_ids", "0,4")
    other = tmp_path / "other.json"
    index = json.loads((workshop / "datasets/toy/toy.index.json").read_text())
    other.write_text(json.dumps(index | {"0": index["1"], "1": index["0"]}))
    assert "tuned with other semantic IDs" in refuse("--index_file", other)
    assert "cannot be written" in refuse("--results_file", "/proc/self/r/r.json")
    for flag, file in (
        ("--predictions_file", tmp_path / "r.json"),
        ("--predictions_file", tmp_path / "r/details.json"),
        ("--results_file", tuned / METADATA_FILE),
        ("--results_file", tuned / "config.json"),
    ):
        assert "name two files" in refuse(flag, file)
    assert not list(tmp_path.glob("r.json"))


def test_users_with_few_items_left_are_stated(capsys):
    """With all items but the target in the history, any model is right; with all items nothing is recommended."""
    dataset = SimpleNamespace(name="toy", item_ids=list("abcdefg"), too_short=[])
    histories = [list("abcdefg"), list("abcdefa"), list("abca")]
    for exclude_seen in (True, False):
        print_users(dataset, histories, ["a", "g", "d"], 3 if exclude_seen else None, "those of training")
        out = capsys.readouterr().out
        assert ("1 users had every item: no item is left to recommend, which counts as a miss" in out) == exclude_seen
        assert ("1 users have at most 3 items left: a list of 3 has their target" in out) == exclude_seen


# ---- Flags and presets ----

GROUPS = [ModelArguments, DataArguments, MethodArguments, LoraArguments, YesNoArguments, TuningArguments]


def test_presets_supply_defaults_and_the_command_line_wins(tmp_path):
    preset = tmp_path / "preset.yaml"
    preset.write_text("epochs: 7\nhis_sep: ''\nadd_prefix: true\nonly_train_response: false\n")
    out = ["--output_dir", str(tmp_path), "--use_cpu"]
    _, data, method, _, _, training = parse(
        GROUPS, "", [*out, "--epochs", "9", "--config", str(preset), "--add_prefix", "False"]
    )
    assert (data.his_sep, data.add_prefix, method.only_train_response, training.num_train_epochs) == (
        "",
        False,
        False,
        9,
    )
    preset.write_text("epoch: 7\n")
    with pytest.raises(InputError, match="'epoch' is not a flag"):
        parse(GROUPS, "", [f"--config={preset}"])


@pytest.mark.parametrize(
    "line",
    [
        *("push_to_hub: true", "hub_model_id: somebody/x", "hub_token: hf_x", "report_to: wandb", "output_dir: x"),
        *("resume_from_checkpoint: auto", "trackio_space_id: x", "trust_remote_code: true", "project: x"),
    ],
)
def test_a_preset_does_not_state_where_anything_goes(tmp_path, line):
    preset = tmp_path / "preset.yaml"
    preset.write_text(line)
    with pytest.raises(InputError, match="on the command line only; take it out of the preset"):
        parse(GROUPS, "", ["--config", str(preset)])
    preset.write_text(f"label_names: [a, '--{line.split(':')[0]}=x']")
    with pytest.raises(InputError, match="would be read as a flag"):
        parse(GROUPS, "", ["--config", str(preset)])


@pytest.mark.parametrize(
    "preset", sorted({*CONFIGS.glob("*.yaml")} - {CONFIGS / "grpo.yaml"}), ids=lambda path: path.stem
)
def test_every_shipped_preset_is_understood(preset, tmp_path):
    more = ["--bf16", "False", "--output_dir", str(tmp_path)]
    if preset.stem in CF_METHODS:
        more += ["--cf_model", "a folder"]
    *groups, training = parse(GROUPS, "", ["--config", str(preset), *more])
    arguments = Arguments(*groups, training)
    method = arguments.method
    assert method.method in preset.stem and training.eval_strategy == training.save_strategy != "no"
    METHODS[method.method].check_flags(arguments)


def test_lc_rec_names_work(tmp_path):
    argv = (
        "--per_device_batch_size 3 --epochs 2 --save_and_eval_strategy no --only_train_response --output_dir".split()
    )
    *_, training = parse(GROUPS, "", [*argv, str(tmp_path)])
    assert training.per_device_train_batch_size == 3 and training.num_train_epochs == 2
    assert training.eval_strategy == training.save_strategy == "no"
