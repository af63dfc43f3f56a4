"""test.py --baselines_only and SASRec on next items, from flags to files."""

import json

import numpy as np
import pytest

import pretrain
import test as test_script
from reclingua.baselines import NEXT_ITEM_BASELINES
from reclingua.inference.next_item_sasrec import MAX_LENGTH, draw_windows
from tests.helpers.toys import write_preferences, write_toy


def measure(script, root, name, *more):
    results = root / "baselines.json"
    flags = ("--baselines_only", "--dataset", name, "--data_path", root, "--results_file", results)
    code, out, error = script(test_script.main, *flags, *more)
    assert code == 0, error
    return json.loads(results.read_text()), out


def test_baselines_of_next_items_and_of_ratings(script, tmp_path):
    write_toy(tmp_path)
    write_preferences(tmp_path)
    results, out = measure(script, tmp_path, "toy", "--exclude_seen", "--metrics", "hit@1,ndcg@5")
    assert "ratings" not in results and results["next_item"]["users"] == 12
    rows = results["next_item"]["baselines"]
    assert list(rows) == [*NEXT_ITEM_BASELINES, "co-occurrence + item-knn + ease"]
    assert rows["co-occurrence"]["hit@1"] > 0.9
    assert set(results["next_item"]["baseline_settings"]["ease"]) == {"l2", "decay", "valid_ndcg@10"}
    assert all(name in out for name in rows)
    results, out = measure(script, tmp_path, "liked")
    assert "next_item" not in results and list(results["ratings"]["baselines"]) == [
        "popularity", "user like-rate", "item like-rate", "like-rates",
    ]  # fmt: skip
    assert results["ratings"]["baselines"]["like-rates"]["test"]["samples"] == 240


def test_bad_input(refused, tmp_path):
    write_toy(tmp_path)
    where = ("--dataset", "toy", "--data_path", tmp_path)
    assert "name the data by --dataset" in refused(test_script.main, "--baselines_only", "--data_path", tmp_path)
    assert "no --ckpt_path" in refused(test_script.main, "--baselines_only", *where, "--ckpt_path", tmp_path)
    assert "or use --baselines_only" in refused(test_script.main, *where)
    assert "no such dataset" in refused(
        test_script.main, "--baselines_only", "--dataset", "x", "--data_path", tmp_path
    )
    sasrec = ("--model", "sasrec", "--task", "next_item", *where)
    assert "is for --model sasrec" in refused(pretrain.main, "--model", "mf", *sasrec[2:])
    assert "is for --model sasrec" in refused(pretrain.main, *sasrec, "--sweep")
    missing = ("--baselines_only", *where, "--cf_model", tmp_path / "none", "--results_file", tmp_path / "r.json")
    assert "no such file" in refused(test_script.main, *missing)


@pytest.mark.slow
def test_sasrec_learns_the_ring_and_is_a_baseline(script, refused, studio, tmp_path):
    write_toy(tmp_path, users=60)
    where = ("--dataset", "toy", "--data_path", tmp_path)
    short = ("--epochs", 40, "--batch_size", 16, "--learning_rate", 0.01, "--embedding_size", 16)
    train = ("--model", "sasrec", "--task", "next_item", "--output_dir", tmp_path / "sasrec", *where, *short)
    code, out, error = script(pretrain.main, *train)
    assert code == 0 and "valid NDCG@10" in out, error
    results, _ = measure(script, tmp_path, "toy", "--cf_model", tmp_path / "sasrec", "--metrics", "hit@1")
    assert results["next_item"]["baselines"]["sasrec"]["hit@1"] > 0.8

    write_toy(tmp_path, users=59)
    flags = ("--baselines_only", *where, "--results_file", tmp_path / "r.json", "--cf_model")
    assert "was trained on other histories (toy)" in refused(test_script.main, *flags, tmp_path / "sasrec")
    assert "scores ratings; next items need" in refused(test_script.main, *flags, studio / "sasrec")
    assert "ranks next items" in refused(test_script.main, "--ckpt_path", tmp_path / "sasrec", *where)


def test_windows_make_every_item_a_target_once():
    draw = np.random.default_rng(0)
    for length in (1, 2, 50, 51, 52, 101, 230):
        for _ in range(20):
            windows = list(draw_windows(np.arange(length), draw))
            targets = [item for window in windows for item in window[1:]]
            assert targets == list(range(1, length))
            assert all(2 <= len(window) <= MAX_LENGTH + 1 for window in windows)
