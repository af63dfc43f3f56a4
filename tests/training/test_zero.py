"""DeepSpeed ZeRO on two processes: the losses of one process for every method, resume and the saved weights."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
import pretrain
import test as test_script
from convert import zero_to_fp32
from reclingua.models.language import load_model, load_tokenizer
from reclingua.training.zero import check_deepspeed
from tests.helpers.preloaded import run_with_preloaded_python
from tests.helpers.scripts import copy_repository, flags, run_main, run_processes
from tests.helpers.toys import write_preferences
from tests.helpers.zero_runs import train_all

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "config"
STEPS = ("--targets", "all", "--max_his_len", 4, "--train_sampling_strategy", "sequential", "--max_steps", 4)
STEPS += ("--per_device_batch_size", 4, "--logging_steps", 1, "--save_and_eval_strategy", "steps", "--save_steps", 2)
STEPS += ("--load_best_model_at_end", "False", "--save_total_limit", 9, "--max_eval_samples", 20)
LORA = ("--lora", "--lora_dropout", 0)
ZERO2 = ("tallrec", "collm")  # one that trains LoRA, one that trains a part of its own; ZeRO-3 shards more
CF_MODELS = ("mf", "lightgcn", "sasrec", "din")
YESNO = ("tallrec", "collm", "binllm", "cora", "softprompt", "personprompt")


def configuration(folder, stage, **zero):
    """Write a shipped configuration in float32, the dtype of a CPU."""
    content = json.loads((CONFIGS / f"ds_z{stage}_bf16.json").read_text())
    del content["bf16"]
    content["zero_optimization"] |= zero
    path = folder / f"z{stage}{''.join(zero)}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    """A folder of trained models, by name."""
    out = tmp_path_factory.mktemp("zero")
    write_preferences(workshop / "datasets")
    liked = ("--dataset", "liked", "--data_path", workshop / "datasets")
    for model in ("hash", *CF_MODELS):
        where = ("--output_dir", out / model, "--results_file", out / f"{model}.json")
        run_main(pretrain.main, "--model", model, *liked, *where, "--embedding_size", 16)
    z2, z3 = configuration(out, 2), configuration(out, 3)
    gathered = configuration(out, 3, stage3_gather_16bit_weights_on_model_save=True)
    runs = {
        "ddp": STEPS,
        "z2": (*STEPS, "--deepspeed", z2),
        "z3": (*STEPS, "--deepspeed", z3),
        "z3-gathered": (*STEPS, "--deepspeed", gathered),
        "ddp-lora": (*STEPS, *LORA),
        "z2-lora": (*STEPS, *LORA, "--deepspeed", z2),
        "z3-lora": (*STEPS, *LORA, "--deepspeed", z3),
        "z3-bf16": (*STEPS, "--max_steps", 2, "--bf16", "--deepspeed", CONFIGS / "ds_z3_bf16.json"),
    }
    runs = {name: {"argv": flags(workshop, out / name, *more)} for name, more in runs.items()}
    for name in ("z3-sigterm", "z3-resumed"):
        argv = (*STEPS, "--deepspeed", gathered, "--resume_from_checkpoint", "auto")
        runs[name] = {"argv": flags(workshop, out / "z3-sigterm", *argv)}
    runs["z3-sigterm"]["sigterm_at"] = 2
    for method in YESNO:
        cf_model = {"collm": "mf", "cora": "mf", "binllm": "hash"}.get(method)
        argv = (*liked, "--method", method, "--base_model", workshop / "base", "--use_cpu")
        argv += ("--cf_model", out / cf_model) if cf_model else ()
        argv += ("--max_steps", 2, "--logging_steps", 1, "--save_and_eval_strategy", "steps", "--save_steps", 2)
        argv += ("--lora_dropout", 0, "--train_sampling_strategy", "sequential")
        argv += ("--train_data_sample_num", 64, "--max_eval_samples", 64)
        if method == "collm":  # its frozen model: one batch shares a prefix, the other does not (see is_zero3)
            argv += ("--max_steps", 12, "--train_sampling_strategy", "random", "--per_device_batch_size", 8)
        for name, more in (("ddp", ()), ("z2", ("--deepspeed", z2)), ("z3", ("--deepspeed", z3))):
            if name == "z2" and method not in ZERO2:
                continue
            runs[f"{name}-{method}"] = {"argv": (*argv, "--output_dir", out / f"{name}-{method}", *more)}
    for kind in CF_MODELS:
        argv = (*liked, "--method", "collm", "--base_model", workshop / "base", "--use_cpu", "--max_steps", 2)
        argv += ("--cf_model", out / kind, "--train_cf_model", "--logging_steps", 1, "--bf16")
        argv += ("--train_data_sample_num", 32, "--save_and_eval_strategy", "no")
        argv += ("--deepspeed", CONFIGS / "ds_z2_bf16.json")
        runs[f"bf16-{kind}"] = {"argv": (*argv, "--output_dir", out / f"bf16-{kind}")}
    for settings in runs.values():
        settings["argv"] = [str(word) for word in settings["argv"]]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_EXTENSIONS_DIR", str(out / "compiled"))
        done = run_processes(2, partial(train_all, list(runs.values())))
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "printed.txt").write_text(done.stdout)
    return out


def losses(folder):
    log = json.loads((folder / "run.json").read_text())["log"]
    return torch.tensor([line["loss"] for line in log if "loss" in line])


def test_losses_equal_those_of_one_process(script, workshop, runs, tmp_path):
    one = flags(workshop, tmp_path / "one", *STEPS, "--gradient_accumulation_steps", 2)
    assert script(finetune.main, *one)[0] == 0
    expected = losses(tmp_path / "one")
    assert len(expected) == 4 and expected[0] - expected[-1] > 0.2
    for name in ("ddp", "z2", "z3", "z3-gathered"):
        torch.testing.assert_close(losses(runs / name), expected, rtol=0, atol=1e-4, msg=name)


def test_nothing_is_compiled(runs):
    assert not (runs / "compiled").exists()


def assert_close(ours, theirs, file="model.safetensors", tolerance=1e-5):
    ours, theirs = load_file(ours / file), load_file(theirs / file)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)


def test_weights_equal_those_of_one_process(runs):
    for name in ("z2", "z3-gathered"):
        assert_close(runs / name, runs / "ddp")
    assert not list((runs / "z3").glob("*.safetensors"))  # they stay sharded
    for name in ("z2-lora", "z3-lora"):
        assert_close(runs / name, runs / "ddp-lora", "adapter_model.safetensors")
    best = [json.loads((runs / name / "run.json").read_text())["best_metric"] for name in ("ddp", "z2", "z3")]
    assert best[0] > 0 and len(set(best)) == 1


def test_sigterm_and_resume_of_two_processes(runs):
    """SIGTERM for one process at step 2 ends both after the step at which they agree."""
    printed, checkpoint = (runs / "printed.txt").read_text(), runs / "z3-sigterm" / "checkpoint-3"
    assert re.search(f"SIGTERM.*{re.escape(str(checkpoint))}", printed)
    assert f"from {checkpoint}" in printed and "torchrun --nproc_per_node 2 " in printed
    assert_close(runs / "z3-sigterm", runs / "z3-gathered", tolerance=0)


@pytest.mark.parametrize("kind", CF_MODELS)
def test_collaborative_models_train_in_half_precision(runs, kind):
    assert torch.isfinite(losses(runs / f"bf16-{kind}")).all()
    before, after = (load_file(runs / name / "model.safetensors") for name in (kind, f"bf16-{kind}"))
    assert any(not torch.equal(before[name], after[f"cf_model.{name}"].float()) for name in before if "weight" in name)


@pytest.mark.parametrize("method", YESNO)
def test_yes_or_no(script, workshop, runs, method):
    for stage in ("z2", "z3") if method in ZERO2 else ("z3",):
        torch.testing.assert_close(
            losses(runs / f"{stage}-{method}"), losses(runs / f"ddp-{method}"), rtol=0, atol=1e-4
        )
        assert_close(runs / f"{stage}-{method}", runs / f"ddp-{method}", tolerance=2e-4)
    code, _, error = script(
        test_script.main, "--ckpt_path", runs / f"z3-{method}", "--data_path", workshop / "datasets",
        "--results_file", runs / "results.json",
    )  # fmt: skip
    assert code == 0, error


def convert(script, state, output, *more):
    code, out, error = script(zero_to_fp32.main, state, output, *more)
    assert code == 0, error
    return output


def test_convert_sharded_state(script, runs, tmp_path):
    assert_close(convert(script, runs / "z3", tmp_path / "z3"), runs / "z3-gathered", tolerance=0)
    assert_close(convert(script, runs / "z2" / "checkpoint-4", tmp_path / "z2"), runs / "z2", tolerance=0)
    model, tokenizer = load_model(tmp_path / "z3"), load_tokenizer(tmp_path / "z3")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "<a_0>" in tokenizer.get_vocab()
    convert(script, runs / "z3-bf16", tmp_path / "half", "--dtype", "bfloat16")
    assert {weight.dtype for weight in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_convert_sh(runs, tmp_path):
    shutil.copytree(runs / "z3", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-2"))
    copy = copy_repository(tmp_path / "repository")

    def convert_all(folder):
        return run_with_preloaded_python(["bash", "convert/convert.sh", str(folder)], copy, {})

    assert convert_all(tmp_path / "run").stdout.count("-> ") == 2
    assert sorted(path.name for path in (tmp_path / "run" / "converted").iterdir()) == ["checkpoint-4", "final"]
    for name in ("checkpoint-4", "final"):
        assert_close(tmp_path / "run" / "converted" / name, runs / "z3-gathered", tolerance=0)
    assert convert_all(tmp_path / "run").stdout.count("skipped") == 2
    assert convert_all(runs / "ddp").returncode == 2


def test_bad_states(refused, workshop, runs, tmp_path):
    def refuse(state, output="out"):
        return refused(zero_to_fp32.main, state, tmp_path / output)

    assert "is a model folder already" in refuse(runs / "ddp")
    assert "is an adapter" in refuse(runs / "z3-lora" / "checkpoint-4")
    assert "no training state" in refuse(runs)
    shutil.copytree(runs / "z3" / "checkpoint-4", tmp_path / "state")
    part = tmp_path / "state" / "global_step4" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert "not a complete training state" in refuse(tmp_path / "state")
    part.unlink()
    assert "not a complete training state" in refuse(tmp_path / "state")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "not empty" in refuse(runs / "z3", "full")
    assert not (tmp_path / "out").exists()
    test_flags = ("--ckpt_path", runs / "z3", "--data_path", workshop / "datasets")
    assert "python -m convert.zero_to_fp32" in refused(test_script.main, *test_flags)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ds_*.json")), ids=lambda path: path.stem)
def test_deepspeed_accepts_shipped_configurations(path, monkeypatch):
    from deepspeed.runtime.config import DeepSpeedConfig

    monkeypatch.setenv("RANK", "0")
    check_deepspeed(str(path), on_cpu=False)
    content = json.loads(path.read_text())
    assert content["zero_optimization"]["stage"] == int(path.stem[4]) and content.keys() & {"bf16", "fp16"}
    sizes = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}
    zero = {key: value for key, value in content["zero_optimization"].items() if value != "auto"}
    parsed = DeepSpeedConfig(content | sizes | {"zero_optimization": zero, "gradient_clipping": 1.0})
    assert parsed.zero_optimization_stage == int(path.stem[4])
    half = parsed.float16_config if "fp16" in path.stem else parsed.bfloat16_config
    assert half.enabled


def test_bad_input(refused, workshop, runs, tmp_path):
    def refuse(*more, out="out"):
        return refused(finetune.main, *flags(workshop, tmp_path / out, *STEPS, *more))

    z3 = CONFIGS / "ds_z3_bf16.json"
    assert "no such file; see config/ds_" in refuse("--deepspeed", tmp_path / "no.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "not a readable JSON file" in refuse("--deepspeed", broken)
    broken.write_text("{}")
    assert "with zero_optimization" in refuse("--deepspeed", broken)
    assert "start with torchrun" in refuse("--deepspeed", z3)
    shutil.copytree(runs / "z3" / "checkpoint-2", tmp_path / "earlier" / "checkpoint-2")
    resumed = ("--resume_from_checkpoint", "auto")
    assert "checkpoint-2: was made with --deepspeed" in refuse(*resumed, out="earlier")
