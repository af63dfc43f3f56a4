"""finetune.py and test.py for the methods that answer Yes or No, from flags to files."""

import json
import shutil
from dataclasses import replace
from html import unescape

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import finetune
import pretrain
import test as test_script
import test_ddp
from convert.scratch import train_tokenizer
from reclingua.methods import METHODS
from reclingua.models.collm import CoLLM
from reclingua.models.registry import YES_NO_METHODS
from reclingua.training.arguments import Arguments, parse
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.scripts import measure, predictions, run_main, run_processes, second, tune
from tests.helpers.toys import write_preferences


@pytest.mark.parametrize("method", ["collm", "binllm", "cora", "softprompt", "personprompt"])
def test_every_method_trains_saves_and_is_measured(script, studio, tmp_path, method):
    code, out, error = script(finetune.main, *second(studio, method, tmp_path / "out", "--train_data_sample_num", 160))
    assert code == 0, error
    assert "the score is the logit of" in out and "valid auc" in out and "valid uauc" in out
    metadata = CheckpointMetadata.load(tmp_path / "out")
    assert metadata.method == method and len(metadata.prompts[YES_NO_METHODS[method][1]]) >= 4
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert size < 4_000_000 and not list((tmp_path / "out").rglob("training_args.bin"))
    results, out = measure(script, studio, tmp_path / "out")
    assert set(results) >= {"test", "warm", "cold"} and 0 <= results["test"]["auc"] <= 1
    assert results["test"]["samples"] == 240 == results["warm"]["samples"] + results["cold"]["samples"]
    assert method in out and "UAUC cold" in out
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["arguments"]["method"] == method and run["best_metric"] == max(
        line["eval_auc"] for line in run["log"] if "eval_auc" in line
    )


def short_templates(folder):
    path = folder / "short.yaml"
    path.write_text(
        "text: [{prompt: '{history} \"{title}\":'}]\nsoft: [{prompt: '{history} \"{title}\" {user} {item}:'}]\n"
    )
    return path


@pytest.mark.parametrize(
    "method, cf_model, more",
    [("collm", "din", ("--learning_rate", 1e-2)), ("cora", "mf", ("--learning_rate", 3e-3, "--lora_r", 8))],
)
def test_the_model_learns_what_its_collaborative_model_knows(script, studio, tmp_path, method, cf_model, more):
    prompts = ("--prompt_file", short_templates(tmp_path), "--cf_model", studio / cf_model)
    layers = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    layers = ("--lora_target_modules", layers) if method == "cora" else ()
    code, _, error = script(finetune.main, *second(studio, method, tmp_path / "out", *more, *prompts, *layers))
    assert code == 0, error
    with_it, _ = measure(script, studio, tmp_path / "out", with_report=True)
    details = json.loads((studio / "results" / "details.json").read_text())
    said = torch.tensor(details["scores"]).sigmoid()  # not of raw logits, which are all far above 0
    assert said.mean().item() == pytest.approx(np.mean(details["labels"]), abs=0.15)
    without, _ = measure(script, studio, studio / "tallrec")
    assert json.loads((studio / f"{cf_model}.json").read_text())["warm"]["auc"] > 0.95
    assert without["warm"]["auc"] < 0.75 and with_it["warm"]["auc"] > 0.9


@pytest.mark.parametrize(
    "method, more, trained",
    [
        ("collm", ("--train_cf_model",), ["cf_model", "projector"]),
        ("collm", ("--cf_model_from_scratch",), ["cf_model", "projector"]),
        ("collm", ("--one_stage",), ["lora", "projector"]),
        ("collm", ("--lora", "--soft_tokens", 2), ["lora", "projector"]),
        ("cora", ("--one_stage", "--train_cf_model"), ["cf_model", "lora", "projector"]),
        ("tallrec", ("--lora", "False"), ["language"]),
        ("binllm", ("--code_format", "ip", "--metric_for_best_model", "uauc"), ["lora"]),
        ("collm", ("--cf_model", "sasrec"), ["projector"]),
        ("cora", ("--gradient_checkpointing", "--max_tokens_per_batch", 2000), ["projector"]),
        ("collm", ("--base_dtype", "bfloat16", "--gradient_accumulation_steps", 2), ["projector"]),
        ("collm", ("--save_base_weights",), ["projector"]),
    ],
)
def test_ways_to_train(script, workshop, studio, tmp_path, method, more, trained):
    more = [studio / "sasrec" if flag == "sasrec" else flag for flag in more]
    start = ("--base_model", workshop / "base") if method == "tallrec" or "--one_stage" in more else ()
    flags = (tune if start else second)(studio, method, tmp_path / "out", *start, "--max_steps", 3)
    code, _, error = script(finetune.main, *flags, "--save_strategy", "no", *more)
    assert code == 0, error
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["trained"] == trained
    if "--save_base_weights" in more:
        shutil.move(workshop / "base", tmp_path / "base")
    try:
        results, _ = measure(script, studio, tmp_path / "out", "--sample_num", 100)
    finally:
        if "--save_base_weights" in more:
            shutil.move(tmp_path / "base", workshop / "base")
    assert results["test"]["samples"] == 100


@pytest.mark.parametrize("method", ["collm", "binllm", "cora"])
def test_cold_pairs_can_be_asked_by_text_alone(script, studio, tmp_path, method):
    steps = ("--max_steps", 8, "--save_strategy", "no", "--learning_rate", 0.03)
    assert script(finetune.main, *second(studio, method, tmp_path / "out", *steps))[0] == 0
    plain, rows = predictions(script, studio, tmp_path / "out")
    text_only, cold_rows = predictions(script, studio, tmp_path / "out", "--cold_text_only")
    moved = {
        row["user"] for row, other in zip(rows, cold_rows, strict=True) if abs(row["score"] - other["score"]) > 1e-4
    }
    assert moved <= {37, 38, 39, 40} and moved
    assert plain["warm"] == pytest.approx(text_only["warm"], abs=1e-6)
    if method == "cora":  # without generated weights it is the first stage
        _, first = predictions(script, studio, studio / "tallrec")
        for row, other in zip(cold_rows, first, strict=True):
            assert row["user"] < 37 or row["score"] == pytest.approx(other["score"], abs=1e-4)


def test_predictions_repeat_the_results_for_every_prompt(script, studio):
    results, rows = predictions(script, studio, studio / "tallrec", "--test_prompt_ids", "all", with_report=True)
    from reclingua.metrics.roc import auc

    assert results["test_prompt_ids"] == [0, 1, 2, 3] and len(rows) == 4 * 240
    for number, expected in enumerate(results["all_prompt_results"]):
        of_it = [row for row in rows if row["prompt"] == number]
        assert auc([row["label"] for row in of_it], [row["score"] for row in of_it]) == expected["test"]["auc"]
    areas = [each["test"]["auc"] for each in results["all_prompt_results"]]
    assert len(set(areas)) > 1
    page = unescape((studio / "results/report.html").read_text())
    spread = {"prompt 3": areas[3], "mean": sum(areas) / 4, "min": min(areas), "max": max(areas)}
    for name, area in spread.items():
        assert f'<th scope="row">{name}</th><td>{area:.4f}</td>' in page
    for asked in CheckpointMetadata.load(studio / "tallrec").prompts["text"]:
        assert f'<td class="text">{" ".join(asked["prompt"].split())[:200]}' in page


def test_two_processes_give_the_results_of_one(script, studio, tmp_path):
    one, rows = predictions(script, studio, studio / "tallrec")
    out = (tmp_path / "two.json", tmp_path / "two.jsonl")
    done = run_processes(
        2, test_ddp.main, "--ckpt_path", studio / "tallrec", "--data_path", studio,
        "--results_file", out[0], "--predictions_file", out[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads(out[0].read_text())
    assert [two[part] for part in ("test", "warm", "cold")] == [one[part] for part in ("test", "warm", "cold")]
    assert [json.loads(line) for line in out[1].read_text().splitlines()] == rows


def test_two_processes_train_as_one_that_accumulates(script, studio, tmp_path):
    same = ("--cf_model", studio / "din", "--train_cf_model", "--per_device_batch_size", 4, "--max_steps", 4)
    same += ("--train_sampling_strategy", "sequential", "--save_and_eval_strategy", "no")
    same += ("--optim", "sgd", "--learning_rate", 0.1)
    two = run_processes(2, finetune.main, *second(studio, "collm", tmp_path / "two", *same))
    assert two.returncode == 0, two.stderr
    flags = second(studio, "collm", tmp_path / "one", *same, "--gradient_accumulation_steps", 2)
    code, _, error = script(finetune.main, *flags)
    assert code == 0, error
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-5)


def test_a_stopped_run_ends_as_if_it_had_not_been(script, studio, tmp_path):
    more = ("--epochs", 2, "--save_steps", 5, "--save_and_eval_strategy", "steps", "--save_total_limit", 99)
    more += ("--load_best_model_at_end", "False", "--resume_from_checkpoint", "auto", "--train_data_sample_num", 60)
    assert script(finetune.main, *second(studio, "cora", tmp_path / "whole", *more))[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for folder in (tmp_path / "cut").glob("checkpoint-*"):
        if folder.name != "checkpoint-10":
            shutil.rmtree(folder)
    code, out, error = script(finetune.main, *second(studio, "cora", tmp_path / "cut", *more))
    assert code == 0 and "checkpoint-10" in out, error
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_loss_that_is_no_number_stops_the_run(studio, tmp_path, refused):
    more = ("--learning_rate", 1e30, "--logging_steps", 1, "--max_grad_norm", 0, "--warmup_steps", 0)
    message = refused(finetune.main, *second(studio, "collm", tmp_path / "out", *more))
    assert "lower --learning_rate" in message
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_metric_that_does_not_exist_is_refused_before_training(
    workshop, studio, tmp_path, refused, monkeypatch, command
):
    shutil.copytree(studio / "liked", tmp_path / "liked")
    rows = {row["uid"]: row for row in pq.read_table(studio / "liked/valid.parquet").to_pylist()}
    pq.write_table(pa.Table.from_pylist(list(rows.values())), tmp_path / "liked/valid.parquet")
    monkeypatch.setattr(finetune.RecTrainer, "train", None)
    monkeypatch.setattr(torch.optim, "Adam", None)
    metric = ("--metric_for_best_model", "uauc", "--dataset", "liked", "--data_path", tmp_path)
    if command == "finetune":
        flags = tune(studio, "tallrec", tmp_path / "out", "--base_model", workshop / "base", *metric)
        assert "no user of its rows has both labels, so that there is no uauc" in refused(finetune.main, *flags)
    else:
        error = refused(pretrain.main, "--model", "mf", "--output_dir", tmp_path / "out", *metric)
        assert "no user has both labels; use --metric_for_best_model auc" in error


def test_a_long_history_is_cut_and_counted(script, workshop, studio, tmp_path):
    shutil.copytree(workshop / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 230}))
    flags = tune(studio, "tallrec", tmp_path / "out", "--base_model", tmp_path / "base", "--max_steps", 1)
    code, out, error = script(finetune.main, *flags, "--max_his_len", 9)
    assert code == 0, error
    assert "prompts of train exceed 230 tokens" in out


def test_bad_input(workshop, studio, tmp_path, refused):
    def refuse(method, *more):
        return refused(finetune.main, *second(studio, method, tmp_path / "out", *more))

    base = ("--base_model", workshop / "base")
    assert "--base_model is required" in refused(finetune.main, *tune(studio, "tallrec", tmp_path / "out"))
    assert "--cf_model is required with --method collm" in refused(
        finetune.main, "--method", "collm", "--dataset", "liked", "--data_path", studio, *base,
        "--output_dir", tmp_path / "out", "--use_cpu",
    )  # fmt: skip
    assert "config.json: no such file" in refuse("collm", "--cf_model", tmp_path)
    assert "is a model of type 'mf'; binllm reads one of hash" in refuse("binllm", "--cf_model", studio / "mf")
    assert "--tasks has no effect with --method collm" in refuse("collm", "--tasks", "x")
    assert "--cf_model has no effect with --method lcrec" in refuse("collm", "--method", "lcrec")
    assert "leave --init_from out" in refuse("collm", "--one_stage")
    assert "--max_his_len 0: should be 1 at least" in refuse("collm", "--max_his_len", 0)
    assert "should be one whole number" in refuse("collm", "--train_data_sample_num", "1,2")
    assert "are for collm and cora" in refuse("binllm", "--train_cf_model")
    assert "--soft_tokens 0: should be 1 at least" in refuse("collm", "--soft_tokens", 0)
    assert "--patience -1: should be 0 at least" in refuse("collm", "--patience", -1)
    assert "not with --load_in_4bit" in refuse("collm", "--save_base_weights", "--load_in_4bit")
    assert "not with tallrec or binllm" in refused(
        finetune.main, *tune(studio, "tallrec", tmp_path / "out", "--one_stage", "--base_model", workshop / "base")
    )
    assert "leave these flags out" in refuse("binllm", "--lora_r", 3)
    assert "--soft_tokens has no effect with --method cora" in refuse("cora", "--soft_tokens", 2)
    assert "--add_prefix has no effect with --method collm" in refuse("collm", "--add_prefix")
    assert "--metric_for_best_model loss: should be auc or uauc" in refuse("collm", "--metric_for_best_model", "loss")
    assert "this model has no layer 'lm_head'" in refuse("cora", "--lora_target_modules", "lm_head")
    assert "are for base models that stay frozen: give --lora" in refused(
        finetune.main, *flags_of_lcrec(workshop, tmp_path / "out"), "--load_in_4bit"
    )
    assert "was made by 'mf'; give one of tallrec" in refuse("collm", "--init_from", studio / "mf")
    assert "4 bits cannot be tuned" in refused(
        finetune.main, *tune(studio, "tallrec", tmp_path / "out", *base, "--lora", "False", "--load_in_4bit")
    )
    assert "all of one label; take more" in refuse("collm", "--train_data_sample_num", 1)
    assert "--patience needs" in refuse("collm", "--patience", 2, "--save_and_eval_strategy", "no")
    assert "should be a multiple of 8" in odd_width(studio, tmp_path, refuse)
    write_preferences(tmp_path, users=20, name="liked")
    assert "was trained on other ratings" in refuse("collm", "--data_path", tmp_path)
    foreign = refused(test_script.main, "--ckpt_path", studio / "mf", "--data_path", tmp_path)
    assert "was trained on other ratings" in foreign
    shutil.copytree(workshop / "base", tmp_path / "mute")
    tokenizer = train_tokenizer(["a"], 300, 512)
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace(
        __import__("tokenizers").Regex("Yes|No"), "?"
    )
    tokenizer.save_pretrained(tmp_path / "mute")
    assert "start with the same token" in refused(
        finetune.main, *tune(studio, "tallrec", tmp_path / "out", "--base_model", tmp_path / "mute")
    )
    assert not list((tmp_path / "out").glob("*"))


def test_liger_is_refused_where_it_would_change_nothing(studio, tmp_path):
    """The Trainer hands Liger the wrapper, whose type it does not know. Without a GPU the flag itself is refused."""
    words = [*map(str, tune(studio, "tallrec", tmp_path / "out", "--base_model", "x"))]
    arguments = Arguments(*parse([*Arguments.__annotations__.values()], "", words))
    METHODS["tallrec"].check_flags(arguments)
    arguments.training.use_liger_kernel = True
    with pytest.raises(InputError, match="would leave that of --method tallrec as it is"):
        METHODS["tallrec"].check_flags(arguments)


def flags_of_lcrec(workshop, output):
    where = ("--dataset", "toy", "--data_path", workshop / "datasets", "--base_model", workshop / "base")
    return *where, "--output_dir", output, "--use_cpu"


def test_the_second_stage_keeps_how_the_first_held_its_base(script, workshop, studio, tmp_path):
    few = ("--max_steps", 2, "--save_strategy", "no", "--save_and_eval_strategy", "no")
    base = ("--base_model", workshop / "base", "--base_dtype", "bfloat16")
    assert script(finetune.main, *tune(studio, "tallrec", tmp_path / "half", *base, *few))[0] == 0
    whole = ("--lora", "False", "--base_model", workshop / "base")
    assert script(finetune.main, *tune(studio, "tallrec", tmp_path / "whole", *whole, *few))[0] == 0
    for name, more in (("half", ()), ("whole", ("--base_dtype", "bfloat16"))):
        out = tmp_path / f"collm-{name}"
        code, _, error = script(
            finetune.main, *tune(studio, "collm", out, "--init_from", tmp_path / name, *more, "--max_steps", 3)
        )
        assert code == 0, error
        config = json.loads((out / "config.json").read_text())
        assert config["base_dtype"] == "bfloat16" and ("language" in config["saved"]) == (name == "whole")
        run = json.loads((out / "run.json").read_text())
        valid = next(line["eval_auc"] for line in run["log"] if "eval_auc" in line)
        model = CoLLM.from_pretrained(out)
        dtypes = {w.dtype for key, w in model.named_parameters() if model.component_of(key) == "language"}
        assert dtypes == {torch.bfloat16} and 0 <= valid <= 1
    flags = tune(studio, "collm", tmp_path / "x", "--init_from", tmp_path / "whole", "--load_in_4bit")
    code, _, error = script(finetune.main, *flags)
    assert code == 2 and "contains a whole language model" in error


def odd_width(studio, tmp_path, refuse):
    size = (
        "--embedding_size",
        6,
        "--epochs",
        2,
        "--output_dir",
        tmp_path / "odd",
        "--results_file",
        tmp_path / "odd.json",
    )
    run_main(pretrain.main, "--model", "mf", "--dataset", "liked", "--data_path", studio, *size)
    return refuse("cora", "--cf_model", tmp_path / "odd")


def test_a_test_of_other_ratings_is_refused(script, studio, tmp_path, refused):
    steps = ("--max_steps", 1, "--save_strategy", "no")
    assert script(finetune.main, *second(studio, "personprompt", tmp_path / "out", *steps))[0] == 0
    write_preferences(tmp_path, users=20, name="liked")
    message = refused(test_script.main, "--ckpt_path", tmp_path / "out", "--data_path", tmp_path)
    assert "knows the users and items of other ratings" in message
    replace(CheckpointMetadata.load(tmp_path / "out"), method="telepathy").save(tmp_path / "out")
    message = refused(test_script.main, "--ckpt_path", tmp_path / "out", "--data_path", studio)
    assert "made by 'telepathy', which is no method" in message
