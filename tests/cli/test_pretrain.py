"""pretrain.py and test.py with collaborative models: results, sweeps, invalid flags and checkpoints."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import pretrain
import test as test_script
from reclingua.models.collaborative.base import CollaborativeModel
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.scripts import run_main
from tests.helpers.toys import write_preferences


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("ratings")
    write_preferences(root)
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """pretrain.py's folder and results for MF."""
    root = tmp_path_factory.mktemp("trained")
    run_main(pretrain.main, *flags(folder, root))
    return root


def flags(folder, root, *more, model="mf"):
    where = (
        "--dataset",
        "liked",
        "--data_path",
        folder,
        "--output_dir",
        root / "mf",
        "--results_file",
        root / "mf.json",
    )
    size = ("--learning_rate", 1e-2, "--embedding_size", 8, "--batch_size", 64, "--epochs", 60)
    return "--model", model, *where, *size, *more


def of_model(folder, trained, *more):
    return "--ckpt_path", trained / "mf", "--dataset", "liked", "--data_path", folder, *more


def test_pretrain_leaves_a_model_its_curve_and_results(folder, trained):
    results = json.loads((trained / "mf.json").read_text())
    assert results["warm"]["auc"] > 0.9 and results["cold"]["samples"] > 0 and results["arguments"]["model"] == "mf"
    assert results["test"]["samples"] == results["warm"]["samples"] + results["cold"]["samples"] == 240
    assert results["test"]["users_counted"] + results["test"]["users_left_out"] == 40
    run = json.loads((trained / "mf/run.json").read_text())
    assert {"epoch", "loss", "auc", "uauc", "seconds"} == set(run["curve"][0])
    assert json.loads((trained / "mf" / METADATA_FILE).read_text()) == {"method": "mf", "dataset": "liked"}


def test_test_py_repeats_pretrain(folder, trained, script, tmp_path):
    out = ("--results_file", tmp_path / "r.json", "--predictions_file", tmp_path / "p.jsonl")
    code, said, error = script(test_script.main, *of_model(folder, trained, *out, "--test_batch_size", 7))
    assert code == 0, error
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "r.json", trained / "mf.json"))
    for part in ("test", "warm", "cold"):
        assert ours[part] == pytest.approx(theirs[part], abs=1e-9)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 240 and set(lines[0]) == {"user", "item", "label", "prompt", "score"}
    assert "AUC all" in said and f"{ours['warm']['uauc']:.4f}" in said
    few = script(
        test_script.main, *of_model(folder, trained, "--results_file", tmp_path / "few.json", "--sample_num", 50)
    )
    assert few[0] == 0 and json.loads((tmp_path / "few.json").read_text())["test"]["samples"] == 50


def test_sweep_tries_every_combination_and_keeps_the_best(folder, tmp_path, script):
    more = ("--sweep", "--weight_decay", 0, 0.9, "--metric_for_best_model", "uauc")
    code, said, error = script(pretrain.main, *flags(folder, tmp_path, *more))
    assert code == 0, error
    run = json.loads((tmp_path / "mf/run.json").read_text())
    assert [line["weight_decay"] for line in run["sweep"]] == [0, 0.9]
    assert run["sweep"][0]["uauc"] > run["sweep"][1]["uauc"] and run["settings"]["weight_decay"] == 0
    table = said[said.index("(valid)") :].splitlines()
    assert float(table[1].split()[1]) == 0 and float(table[2].split()[1]) == 0.9  # best first


def test_a_metric_that_does_not_exist_is_a_dash(tmp_path, script):
    """A row per user in valid and test: UAUC is not defined, AUC is."""
    write_preferences(tmp_path)
    for part in ("valid", "test"):
        path = tmp_path / f"liked/{part}.parquet"
        rows = {row["uid"]: row for row in pq.read_table(path).to_pylist()}
        pq.write_table(pa.Table.from_pylist(list(rows.values())), path)
    more = ("--sweep", "--weight_decay", 0, 0.9, "--epochs", 2)
    code, said, error = script(pretrain.main, *flags(tmp_path, tmp_path, *more))
    assert code == 0 and "UAUC -" in said and (tmp_path / "mf/model.safetensors").exists(), error
    assert all(line.split()[4] == "-" for line in said[said.index("(valid)") :].splitlines()[1:3])


@pytest.mark.parametrize("batch_size, said_of", [(64, "the loss is"), (10_000, "scores are NaN")])
def test_a_diverged_run_is_left_out_of_a_sweep(folder, tmp_path, script, refused, batch_size, said_of):
    bad = ("--learning_rate", "1e30")
    more = ("--weight_decay", 0, "--epochs", 5, "--batch_size", batch_size)
    error = refused(pretrain.main, *flags(folder, tmp_path, *more, *bad, model="din"))
    assert "no training finished" in error and not (tmp_path / "mf.json").exists()
    code, said, _ = script(pretrain.main, *flags(folder, tmp_path, *more, "--sweep", *bad, "1e-2", model="din"))
    assert code == 0 and said_of in said
    assert json.loads((tmp_path / "mf/run.json").read_text())["settings"]["learning_rate"] == 1e-2


REFUSED = {
    "two values": (("--learning_rate", 1e-2, 1e-3), "--learning_rate has 2 values: give one, or add --sweep"),
    "rate": (("--learning_rate", 0), "--learning_rate 0.0: should be above 0"),
    "decay": (("--weight_decay", -1), "--weight_decay -1.0"),
    "size": (("--embedding_size", 0), "--embedding_size 0: should be above 0"),
    "epochs": (("--epochs", 0), "--epochs 0: should be from 1 to"),
    "batch": (("--batch_size", 0), "--batch_size 0: should be from 1 to"),
    "dataset": (("--dataset", "nothing"), "nothing: no such dataset folder"),
    "seed": (("--seed", -1), "--seed -1: should be from 0 to"),
    "memory": (("--embedding_size", 10**12), "memory cannot hold a mf of that size"),
    "model": (("--model", "bpr"), "invalid choice: 'bpr'"),
    "hash": (("--model", "hash", "--epochs", 50), "--epochs 50: hash keeps no state before epoch 51"),
    "heads": (("--model", "sasrec", "--embedding_size", 6), "--embedding_size 6: should be a multiple of 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pretrain_refuses(folder, tmp_path, refused, case):
    more, message = REFUSED[case]
    assert message in refused(pretrain.main, *flags(folder, tmp_path, *more))
    assert not (tmp_path / "mf.json").exists()


def test_checkpoints_of_other_data_are_refused(folder, trained, refused, tmp_path):
    out = ("--results_file", tmp_path / "r.json")

    def refusal(write):
        return refused(test_script.main, *of_model(write(tmp_path / "other").parent, trained, *out))

    assert "was trained on other ratings (liked)" in refusal(lambda root: write_preferences(root, users=39))
    assert "knows users up to 40" in refusal(lambda root: write_preferences(root, users=41))
    assert "knows items up to 30" in refusal(lambda root: write_preferences(root, items=31))
    assert not (tmp_path / "r.json").exists()


def test_broken_checkpoints_are_refused(folder, trained, refused, tmp_path):
    missing = refused(test_script.main, *of_model(folder, tmp_path))
    assert "no such file; it should contain the metadata of a model" in missing
    for name in ("config.json", "model.safetensors", METADATA_FILE):
        (tmp_path / "mf").mkdir(exist_ok=True)
        (tmp_path / "mf" / name).write_bytes((trained / "mf" / name).read_bytes())
    (tmp_path / "mf/model.safetensors").write_bytes(b"nothing")
    assert "its model cannot be loaded" in refused(test_script.main, *of_model(folder, tmp_path))
    (tmp_path / "mf/config.json").unlink()
    assert "it should contain the config of a collaborative model" in refused(
        test_script.main, *of_model(folder, tmp_path)
    )
    (tmp_path / "mf/config.json").write_text('{"model_type": "llama"}')
    assert "contains a model of type 'llama'" in refused(test_script.main, *of_model(folder, tmp_path))


def test_weights_that_are_not_the_models_are_refused(folder, trained, refused, tmp_path):
    """Missing or foreign tensors would be replaced by random ones, and a pickle would run what it holds."""
    shutil.copytree(trained / "mf", tmp_path / "mf")
    weights = load_file(tmp_path / "mf/model.safetensors")
    save_file({"user_embedding.weight": weights["user_embedding.weight"]}, tmp_path / "mf/model.safetensors")
    assert "weights do not match its config (item_embedding.weight)" in refused(
        test_script.main, *of_model(folder, tmp_path)
    )
    (tmp_path / "mf/model.safetensors").unlink()
    torch.save(weights, tmp_path / "mf/pytorch_model.bin")
    assert "its model cannot be loaded" in refused(test_script.main, *of_model(folder, tmp_path))
    (tmp_path / "mf" / METADATA_FILE).write_text('{"a": 1}')
    assert "names no method" in refused(test_script.main, *of_model(folder, tmp_path))


def test_a_model_that_cannot_be_written_leaves_the_old_one(folder, refused, tmp_path, monkeypatch):
    run_main(pretrain.main, *flags(folder, tmp_path))
    before = {path.name: path.read_bytes() for path in (tmp_path / "mf").iterdir()}

    def full_disk(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(CollaborativeModel, "save_pretrained", full_disk)
    other = flags(folder, tmp_path, "--seed", 7)
    assert "exists, and it was made with another settings" in refused(pretrain.main, *other)
    assert "the model cannot be written there" in refused(pretrain.main, *other, "--force")
    assert {path.name: path.read_bytes() for path in (tmp_path / "mf").iterdir()} == before


def test_patience_is_a_flag(folder, tmp_path):
    run_main(pretrain.main, *flags(folder, tmp_path, "--patience", 2))
    curve = json.loads((tmp_path / "mf/run.json").read_text())["curve"]
    assert len(curve) == max(range(len(curve)), key=lambda at: curve[at]["auc"]) + 1 + 2
