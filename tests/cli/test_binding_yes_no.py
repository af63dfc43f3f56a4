"""A Yes/No model is tested with its own base model, its own items, and ratings that it was not trained on."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import finetune
import test as test_script
from convert import scratch
from reclingua.datasets.ratings import open_ratings
from reclingua.inference.loading import check_same_titles, load_metadata
from reclingua.utils.errors import InputError
from tests.helpers.scripts import measure, run_main, second, tune

FEW = ("--max_steps", 1, "--save_strategy", "no")


@pytest.fixture
def data(studio, tmp_path):
    """A copy of the ratings, to be changed."""
    shutil.copytree(studio / "liked", tmp_path / "data/liked")
    return tmp_path / "data"


@pytest.fixture
def rewrite_items(data):
    def rewrite(change):
        path = data / "liked/item.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite


def test_another_base_model_of_the_same_shapes_is_refused(workshop, studio, tmp_path, refused, script):
    size = ("--vocab_size", 320, "--hidden_size", 64, "--layers", 2, "--attention_dropout", 0, "--seed", 1)
    where = ("--dataset", "toy", "--data_path", workshop / "datasets", "--output_dir", tmp_path / "other")
    run_main(scratch.main, *where, *size)
    source = ("--ckpt_path", studio / "tallrec", "--data_path", studio)
    message = refused(test_script.main, *source, "--base_model", tmp_path / "other")
    assert f"{tmp_path / 'other'}: is not the base model that {studio / 'tallrec'} was tuned on" in message
    shutil.copytree(workshop / "base", tmp_path / "copy")
    measure(script, tmp_path, studio / "tallrec", "--data_path", studio, "--base_model", tmp_path / "copy")


def test_paths_are_stored_absolute(workshop, studio, tmp_path, script, monkeypatch):
    monkeypatch.chdir(studio)
    assert script(finetune.main, *second(studio, "collm", tmp_path / "out", "--cf_model", "mf", *FEW))[0] == 0
    monkeypatch.chdir(workshop)
    flags = tune(studio, "tallrec", tmp_path / "first", "--base_model", "base", *FEW)
    assert script(finetune.main, *flags)[0] == 0
    config, first = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "first"))
    assert config["cf_model"] == str(studio / "mf") and Path(config["base_model"]).is_absolute()
    assert first["base_model"] == str(workshop / "base") and first["base_sha256"] == config["base_sha256"]


CHANGES = {
    "added": (lambda items: items | {"31": {"title": "New"}}, "item '31' is not among the items that"),
    "left": (lambda items: {i: about for i, about in items.items() if i != "3"}, "has no item '3', one of those that"),
    "moved": (lambda items: items | {"1": items["2"], "2": items["1"]}, "item '1' is 'Thing 2', but"),
}


@pytest.fixture(scope="module")
def personal(studio, tmp_path_factory):
    """A model that knows items by their numbers."""
    folder = tmp_path_factory.mktemp("personal") / "out"
    run_main(finetune.main, *second(studio, "personprompt", folder, *FEW))
    return folder


@pytest.mark.parametrize("case", ["added", "moved"])
def test_items_that_changed_are_refused_except_by_tallrec(
    studio, personal, data, tmp_path, refused, script, rewrite_items, case
):
    change, problem = CHANGES[case]
    rewrite_items(change)
    message = refused(test_script.main, "--ckpt_path", personal, "--data_path", data)
    assert problem in message and "restore the file, or train the model again" in message
    results, _ = measure(script, tmp_path, studio / "tallrec", "--data_path", data)
    assert results["ratings"] == "those of training"


@pytest.mark.parametrize("case", CHANGES)
def test_which_item_changed_is_stated(personal, data, rewrite_items, case):
    dataset, (change, problem) = open_ratings(data, "liked"), CHANGES[case]
    changed = replace(dataset, items=change(dataset.items))
    with pytest.raises(InputError, match=re.escape(problem)):
        check_same_titles(personal, load_metadata(personal), changed)


def test_an_edited_title_is_stated_and_used(personal, data, tmp_path, script, rewrite_items):
    rewrite_items(lambda items: items | {"1": {"title": "Thing one"}})
    _, out = measure(script, tmp_path, personal, "--data_path", data)
    assert "item.json: 1 items have other titles than when" in out
    (tmp_path / "old").mkdir()
    for path in personal.iterdir():
        if path.is_file() and path.name != "items.json":
            shutil.copy(path, tmp_path / "old")
    code, _, error = script(test_script.main, "--ckpt_path", tmp_path / "old", "--data_path", data)
    assert code == 2 and "are not the items that" in error


def test_items_that_a_collaborative_model_does_not_know(studio, data, refused, rewrite_items):
    rewrite_items(lambda items: items | {"31": {"title": "New"}})
    message = refused(test_script.main, "--ckpt_path", studio / "mf", "--data_path", data)
    assert "knows items up to 30" in message


@pytest.mark.parametrize("model", ["tallrec", "mf"])
def test_ratings_that_a_model_was_trained_on_are_refused(studio, data, tmp_path, refused, script, model):
    shutil.copy(data / "liked/train.parquet", data / "liked/test.parquet")
    source = ("--data_path", data, "--sample_num", 40)
    results_file = ("--results_file", tmp_path / "results.json")
    message = refused(test_script.main, "--ckpt_path", studio / model, *source, *results_file)
    assert "40 of 40 test ratings can be ratings that" in message and "--allow_other_histories" in message
    results, _ = measure(
        script, tmp_path, studio / model, *source, "--allow_other_histories", with_report=model == "mf"
    )
    expected = "those of training: 40 of 40 test ratings can be ratings that the model was trained on"
    assert results["ratings"] == expected
    if model == "mf":
        assert f"The ratings are {expected}." in (tmp_path / "results/report.html").read_text()


def test_prompts_that_are_too_long_are_counted(workshop, studio, tmp_path, script):
    shutil.copytree(workshop / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 230}))
    flags = tune(studio, "tallrec", tmp_path / "out", "--base_model", tmp_path / "base", *FEW)
    assert script(finetune.main, *flags, "--max_his_len", 9)[0] == 0
    results, out = measure(script, tmp_path, tmp_path / "out", "--data_path", studio, "--test_prompt_ids", "all")
    numbers = results["num_truncated"]
    assert len(numbers) == 4 and max(numbers) > 0 and f"{max(numbers):,} of 240 prompts are too long" in out
    results, out = measure(script, tmp_path, studio / "tallrec", "--data_path", studio)
    assert results["num_truncated"] == [0] and "too long" not in out
