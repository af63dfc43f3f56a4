"""grpo.py from flags to files: the policy finds the optimum, resumes to the bit, refuses bad input."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

import finetune
import grpo
import test as test_script
from reclingua.training.callbacks import SaveOnSigtermCallback
from reclingua.training.checkpoints import newest_checkpoint
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.scripts import flags, run_main, run_processes

pytestmark = pytest.mark.slow

LEARN = ("--targets", "all", "--max_his_len", 3, "--his_sep", "", "--save_and_eval_strategy", "no")
FEW = ("--max_steps", 6, "--save_steps", 3, "--max_eval_samples", 8, "--load_best_model_at_end", "False")
FEW += ("--save_total_limit", 9, "--per_device_batch_size", 12)


@pytest.fixture(scope="module")
def sft(workshop):
    """A model that has seen the ring a few times: its best item is often wrong."""
    run_main(finetune.main, *flags(workshop, workshop / "sft", *LEARN, "--epochs", 3))
    return workshop / "sft"


@pytest.fixture(scope="module")
def adapter(workshop):
    learn = (*LEARN, "--epochs", 1, "--lora", "--lora_r", 4)
    run_main(finetune.main, *flags(workshop, workshop / "sft-adapter", *learn))
    return workshop / "sft-adapter"


@pytest.fixture
def policy_flags(workshop, sft, tmp_path):
    """policy_flags(name, *more): flags of a run into tmp_path/name."""

    def given(name, *more, ckpt=sft):
        where = ("--ckpt_path", ckpt, "--data_path", workshop / "datasets", "--output_dir", tmp_path / name)
        return *where, "--num_generations", 4, "--learning_rate", 1e-3, "--logging_steps", 2, "--use_cpu", *more

    return given


def run_log(folder):
    return json.loads((folder / "run.json").read_text())["log"]


def weights(folder):
    return {name: w for file in sorted(folder.glob("*model*.safetensors")) for name, w in load_file(file).items()}


def is_same(folder, other):
    ours, theirs = weights(folder), weights(other)
    return bool(ours) and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "more",
    [
        ("--rewards", "exact:1,prefix:0.5"),
        ("--candidates", "sample", "--add_target", "--score_over", "trie", "--updates_per_rollout", 2),
        ("--loss", "sdpo", "--beta", 0.5, "--add_target"),
    ],
    ids=["beam", "sample", "sdpo"],
)
def test_the_policy_finds_the_optimum(script, workshop, policy_flags, tmp_path, more):
    learn = ("--learning_rate", 3e-3, "--beta", 0.001, "--per_device_batch_size", 32, "--max_steps", 72)
    learn += ("--save_steps", 36, "--max_eval_samples", 40, "--logging_steps", 8)
    learn += ("--lr_scheduler_type", "constant_with_warmup")
    code, out, error = script(grpo.main, *policy_flags("out", *learn, *more))
    assert code == 0, error
    log = run_log(tmp_path / "out")
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    before, *_, after = [entry["eval_ndcg@10"] for entry in log if "eval_ndcg@10" in entry]
    assert before < 0.7 and after > 0.95, (before, after)
    assert "that selects nothing: " in out
    if "--add_target" not in more:
        assert rewards[-1] > 1.3 * rewards[0], rewards
    metadata = CheckpointMetadata.load(tmp_path / "out")
    assert metadata.base_model == str(workshop / "sft") and metadata.training["loss"] in ("grpo", "sdpo")
    where = ("--ckpt_path", tmp_path / "out", "--data_path", workshop / "datasets", "--metrics", "hit@1")
    code, _, error = script(test_script.main, *where, "--num_beams", 5, "--results_file", tmp_path / "results.json")
    assert code == 0, error
    assert json.loads((tmp_path / "results.json").read_text())["mean_results"]["hit@1"] > 0.8


def test_an_unchanged_policy_has_no_divergence(script, sft, policy_flags, tmp_path):
    code, out, error = script(
        grpo.main, *policy_flags("out", "--learning_rate", 0, "--max_steps", 4, "--save_steps", 2)
    )
    assert code == 0 and "its weights are kept" in out, error
    log = [entry for entry in run_log(tmp_path / "out") if "kl" in entry]
    assert log and all(abs(entry["kl"]) < 1e-9 and entry["clipped"] == 0 for entry in log)
    assert all(0 < entry["entropy"] < 1.4 and 0 <= entry["skipped"] < 1 and 0 < entry["hit"] <= 1 for entry in log)
    assert is_same(tmp_path / "out", sft)


def test_weights_of_sft_are_kept_if_no_checkpoint_is_better(script, sft, policy_flags, tmp_path):
    harmful = ("--rewards", "exact:-1", "--learning_rate", 1e-2, "--max_steps", 4, "--save_steps", 2)
    code, out, error = script(grpo.main, *policy_flags("out", *harmful))
    assert code == 0 and "its weights are kept" in out, error
    assert is_same(tmp_path / "out", sft) and not is_same(tmp_path / "out/checkpoint-4", sft)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["best_step"] == 0 and run["best_metric"] == run["log"][0]["eval_ndcg@10"]


@pytest.mark.parametrize("candidates", ["beam", "sample"])
def test_a_resumed_run_is_the_same_to_the_bit(script, policy_flags, tmp_path, candidates):
    """Checkpoint 3 lies between two updates with the same candidates, of two batches each."""
    more = (*FEW, "--candidates", candidates, "--updates_per_rollout", 2, "--gradient_accumulation_steps", 2)
    more += ("--num_generations", 3, "--resume_from_checkpoint", "auto", "--exclude_seen")
    assert script(grpo.main, *policy_flags("out", *more))[0] == 0
    assert (tmp_path / "out/checkpoint-3/rollouts_0.safetensors").exists()
    assert not (tmp_path / "out/checkpoint-6/rollouts_0.safetensors").exists()
    shutil.copytree(tmp_path / "out/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    code, out, error = script(grpo.main, *policy_flags("resumed", *more))
    assert code == 0 and "resuming from" in out, error
    assert is_same(tmp_path / "resumed", tmp_path / "out")
    assert not is_same(tmp_path / "out/checkpoint-3", tmp_path / "out")


def test_sigterm_saves_and_the_run_resumes(script, policy_flags, tmp_path, monkeypatch):
    more = (*FEW, "--updates_per_rollout", 2)
    assert script(grpo.main, *policy_flags("out", *more))[0] == 0
    on_step_end = SaveOnSigtermCallback.on_step_end

    def kill_at_step_1(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(SaveOnSigtermCallback, "on_step_end", kill_at_step_1)
        code, out, error = script(grpo.main, *policy_flags("killed", *more))
    assert code == 0 and "ended by SIGTERM" in out and "--resume_from_checkpoint auto" in out, error
    assert newest_checkpoint(tmp_path / "killed").name == "checkpoint-1"
    assert not (tmp_path / "killed/run.json").exists()
    resumed = policy_flags("killed", *more, "--resume_from_checkpoint", "auto")
    assert script(grpo.main, *resumed)[0] == 0
    assert is_same(tmp_path / "killed", tmp_path / "out")


def test_two_processes_make_the_updates_of_accumulation(script, policy_flags, tmp_path):
    same = ("--train_sampling_strategy", "sequential", "--optim", "sgd", "--learning_rate", 0.1)
    same += (*FEW, "--updates_per_rollout", 2, "--per_device_batch_size", 10, "--save_strategy", "no")
    two = run_processes(2, grpo.main, *policy_flags("two", *same))
    assert two.returncode == 0, two.stderr
    code, _, error = script(grpo.main, *policy_flags("one", *same, "--gradient_accumulation_steps", 2))
    assert code == 0, error
    ours, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)
    assert not is_same(tmp_path / "one", tmp_path / "two/../../sft")
    figures = [[entry["reward"] for entry in run_log(tmp_path / name) if "reward" in entry] for name in ("two", "one")]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6) and figures[0]


@pytest.mark.parametrize("kind", ["new", "further"])
def test_lora(script, workshop, sft, adapter, policy_flags, tmp_path, kind):
    more = ("--lora", "--lora_r", 4) if kind == "new" else ()
    given = policy_flags("out", *FEW, *more, "--logging_steps", 1, ckpt=sft if kind == "new" else adapter)
    code, out, error = script(grpo.main, *given)
    assert code == 0, error
    kl = [entry["kl"] for entry in run_log(tmp_path / "out") if "kl" in entry]
    assert abs(kl[0]) < 1e-9 < kl[-1]
    metadata = CheckpointMetadata.load(tmp_path / "out")
    assert metadata.lora["rank"] == 4
    assert metadata.base_model == str(sft if kind == "new" else workshop / "base")
    where = ("--ckpt_path", tmp_path / "out", "--data_path", workshop / "datasets", "--num_beams", 5)
    code, _, error = script(
        test_script.main, *where, "--metrics", "hit@5", "--results_file", tmp_path / "results.json"
    )
    assert code == 0, error


def test_bad_input(workshop, sft, adapter, policy_flags, tmp_path, refused):
    def refuse(*more, **options):
        return refused(grpo.main, *policy_flags("out", *more, **options))

    (tmp_path / "tallrec").mkdir()
    CheckpointMetadata("tallrec", "liked").save(tmp_path / "tallrec")
    assert "was made by 'tallrec', which recommends no items" in refuse(ckpt=tmp_path / "tallrec")
    assert "should be 2 at least, since candidates are compared" in refuse("--num_generations", 1)
    assert "--rewards 'hit': should be of exact, rank_penalty" in refuse("--rewards", "exact:1,hit:2")
    assert "no such file" in refuse(ckpt=tmp_path / "nothing")
    assert "--beta 0.0: should be" in refuse("--loss", "sdpo", "--beta", 0)
    assert "--base_model: the checkpoint has all weights" in refuse("--base_model", workshop / "base")
    assert "has no effect without --lora" in refuse("--lora_r", 4)
    assert "whose weights are trained further" in refuse("--lora", ckpt=adapter)
    assert "--deepspeed is not supported here" in refuse("--deepspeed", "config/ds_z2_bf16.json")
    assert "--metric_for_best_model auc: should be" in refuse("--metric_for_best_model", "auc")
    assert "--ckpt_path" in refuse(ckpt=tmp_path / "out")
    assert "--ckpt_path is required" in refused(grpo.main, "--output_dir", tmp_path / "out")
    shutil.copytree(workshop / "datasets", tmp_path / "changed")
    path = tmp_path / "changed/toy/toy.inter.json"
    histories = json.loads(path.read_text())
    histories["0"] = histories["0"][1:]
    path.write_text(json.dumps(histories))
    assert "are not the histories that" in refuse("--data_path", tmp_path / "changed")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*"))
