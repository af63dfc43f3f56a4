"""A next-item checkpoint is tested on what belongs to it: its semantic IDs, its items, histories it never saw."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import finetune
import recommend
import test as test_script
from convert import scratch
from index import generate
from reclingua import Recommender
from reclingua.utils.metadata import FILES, CheckpointMetadata, default_results_file
from tests.helpers.scripts import flags, run_main

FEW = ("--num_beams", 5, "--metrics", "hit@1,hit@5")


@pytest.fixture
def data(workshop, tmp_path):
    """A copy of the tuned model's data, to be changed."""
    shutil.copytree(workshop / "datasets", tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.fixture
def rewrite(data):
    """rewrite("inter", change): rewrite toy.inter.json by a function on its content."""

    def rewrite_file(name, change):
        path = data / "toy" / f"toy.{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return rewrite_file


@pytest.fixture
def asked(data, tuned, tmp_path, script):
    """asked(*flags): (exit code, results of a test of the tuned model, stdout, stderr)."""

    def ask(*more, with_report=False, ckpt=tuned):
        file = tmp_path / "results.json"
        file.unlink(missing_ok=True)
        where = ("--ckpt_path", ckpt, "--data_path", data, "--results_file", file)
        with pytest.MonkeyPatch.context() as patch:
            if not with_report:
                patch.setattr(test_script, "write_report", lambda *_: "nowhere")
            code, out, error = script(test_script.main, *where, *FEW, *more)
        return code, json.loads(file.read_text()) if file.exists() else None, out, error

    return ask


def test_a_checkpoint_holds_what_a_test_needs(tuned, workshop):
    assert {"reclingua.json", *FILES.values()} <= {path.name for path in tuned.iterdir()}
    assert {"reclingua.json", *FILES.values()} <= {path.name for path in next(tuned.glob("checkpoint-*")).iterdir()}
    index = json.loads((workshop / "datasets/toy/toy.index.json").read_text())
    assert json.loads((tuned / FILES["index"]).read_text()) == index
    assert json.loads((tuned / FILES["items"]).read_text())["3"] == {"title": "Toy number 3"}


def test_histories_of_training(asked):
    code, results, out, _ = asked()
    assert code == 0 and results["histories"] == "those of training" and "histories those of training" in out


def test_targets_that_were_trained_on_are_refused(asked, rewrite, tmp_path):
    rewrite("inter", lambda inter: {user: history[:-2] for user, history in inter.items()})
    code, results, _, error = asked("--exclude_seen")
    assert code == 2 and results is None and error.count("\n") == 1
    assert "60 of 60 test targets can be items that it was trained on" in error and "--allow_other_histories" in error
    code, results, out, error = asked("--allow_other_histories", with_report=True)
    assert code == 0, error
    expected = "not those of training: 60 of 60 targets can be items that the model was trained on"
    assert results["histories"] == expected and expected in out
    assert expected in (tmp_path / "results/report.html").read_text()


def test_later_interactions_are_measured_and_stated(asked, rewrite):
    rewrite("inter", lambda inter: {user: [*history, history[-1]] for user, history in inter.items()})
    code, results, _, error = asked()
    assert code == 0, error
    assert results["histories"].startswith("not those of training: 0 of 60 targets")


def test_other_semantic_ids_in_the_dataset_do_not_matter(asked, data, script, rewrite):
    _, before, _, _ = asked()
    random = ("--dataset", "toy", "--data_path", data, "--random", "--codebook_sizes", 3, 4)
    assert script(generate.main, *random)[0] == 2  # it would replace the index
    assert script(generate.main, *random, "--force")[0] == 0
    assert asked()[1]["mean_results"] == before["mean_results"]
    code, _, _, error = asked("--index_file", ".index.json")
    assert code == 2 and "was tuned with other semantic IDs than" in error and "leave --index_file out" in error


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index | {"4": ["<a_1>", "<b_9>"]}, "the code '<b_9>' of item '4' is new"),
        (lambda index: index | {"0": index["1"], "1": index["0"]}, "item '0' has <a_0><b_1> instead of <a_0><b_0>"),
        (lambda index: {item: tokens for item, tokens in index.items() if item != "8"}, "item '8' is missing"),
    ],
)
def test_an_index_file_is_compared_with_that_of_the_checkpoint(asked, data, rewrite, change, message):
    rewrite("index", change)
    rewrite("inter", lambda inter: {user: [i for i in items if i != 8] for user, items in inter.items()})
    (data / "toy/toy.item.json").unlink()
    code, _, _, error = asked("--index_file", ".index.json")
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_new_item_is_recommended_without_training(asked, rewrite, data, tuned, tmp_path, script):
    """The index file has a further item, whose codes the model knows."""
    rewrite("item", lambda items: items | {"9": {"title": "Toy number 9"}})
    code, _, _, error = asked()
    assert code == 2 and "item '9' is not among the items" in error and "index.generate --extend" in error
    assert "item '9' of toy.item.json has no index" in asked("--index_file", ".index.json")[3]

    rewrite("index", lambda index: index | {"9": ["<a_0>", "<a_1>"]})
    rewrite("inter", lambda inter: {user: [*items, *[9] * (int(user) % 3 > 0)] for user, items in inter.items()})
    code, results, out, error = asked("--index_file", ".index.json", "--num_beams", 10, "--metrics", "hit@10")
    assert code == 0 and "1 items are new since" in out, error
    assert results["mean_results"]["hit@10"] == 1 and results["histories"].startswith("not those of training: 0 of")
    cold, warm = (results["cold_items"][part] for part in ("cold", "warm"))  # the new item is in no training history
    assert (cold["targets"], warm["targets"]) == (40, 20) and "cold targets: 40" in out
    assert {"random", "text-neighbours", "popularity", "lcrec"} <= cold["rows"].keys() == warm["rows"].keys()
    assert cold["rows"]["lcrec"]["hit@10"] == cold["rows"]["random"]["hit@10"] == 1  # of ten candidates
    recommender = Recommender.from_pretrained(tuned, data, index_file=".index.json")
    known = Recommender.from_pretrained(tuned, None)
    (ranked,), (before,) = (model.recommend([["1", "2", "3"]], k=10) for model in (recommender, known))
    assert {entry.item for entry in ranked} == {*"0123456789"} and recommender.dataset.title("9") == "Toy number 9"
    assert [entry for entry in ranked if entry.item != "9"] == pytest.approx(before)
    (scores,) = recommender.score([["9"]], [["9", "4"]])
    assert np.isfinite(scores).all()

    where = ("--ckpt_path", tuned, "--data_path", data, "--output", tmp_path / "lists.csv", "--k", 10)
    code, out, error = script(recommend.main, *where, "--index_file", ".index.json")
    assert code == 0 and "1 items are new since" in out, error
    assert (tmp_path / "lists.csv").read_text().count("Toy number 9") == 60


def test_a_tuned_model_gets_no_new_code(workshop, tuned, tmp_path, refused, data, rewrite):
    rewrite("item", lambda items: items | {"9": {"title": "Toy number 9"}})
    rewrite("index", lambda index: index | {"9": ["<a_2>", "<b_9>"]})
    more = ("--data_path", data, "--base_model", tuned)
    message = refused(finetune.main, *flags(workshop, tmp_path / "out", *more))
    assert "index token '<b_9>' of item '9' is new" in message and "5 of these" not in message
    assert "6 of these 7 codes" in message and "tune its base model" in message


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda items: items | {"3": items["4"], "4": items["3"]},
            "item '3' is 'Toy number 4', but 'Toy number 3' among the items",
        ),
        (lambda items: items | {"9": {"title": "New"}}, "item '9' is not among the items"),
        (lambda items: items, None),
    ],
)
def test_items_are_those_of_training(asked, rewrite, change, message):
    rewrite("item", change)
    code, _, _, error = asked()
    assert code == (2 if message else 0) and (message or "") in error


def test_raw_ids_tell_items_apart_where_both_sides_have_them(workshop, data, tuned, tmp_path, script, asked, rewrite):
    raw = "".join(f"B00{item}\t{item}\n" for item in range(9))
    (data / "toy/toy.item2id").write_text(raw)
    few = ("--data_path", data, "--max_steps", 1, "--save_and_eval_strategy", "no")
    assert script(finetune.main, *flags(workshop, tmp_path / "raw", *few))[0] == 0
    items = json.loads((tmp_path / "raw" / FILES["items"]).read_text())
    assert items["3"] == {"title": "Toy number 3", "raw_id": "B003"}
    rewrite("item", lambda items: items | {"3": items["4"]})  # a title that another item had
    assert asked(ckpt=tmp_path / "raw")[0] == 0 and asked()[0] == 2
    (data / "toy/toy.item2id").write_text(raw.replace("B003", "B009"))
    assert "item '3' is 'B009', but 'B003' among the items" in asked(ckpt=tmp_path / "raw")[3]


def test_edited_titles_are_stated(asked, rewrite):
    rewrite("item", lambda items: {item: {"title": f"Renamed {item}"} for item in items})
    code, _, out, error = asked()
    assert code == 0 and "9 items have other titles than when" in out and "Renamed" in out, error


def test_an_item_that_left(asked, rewrite):
    rewrite("item", lambda items: {item: record for item, record in items.items() if item != "8"})
    rewrite("inter", lambda inter: {user: items for user, items in inter.items() if 8 not in items})
    code, _, _, error = asked()
    assert code == 2 and "has no item '8', one of the items" in error


def test_titles_come_from_the_checkpoint_where_the_dataset_has_none(asked, data):
    (data / "toy/toy.item.json").unlink()
    code, _, out, error = asked()
    assert code == 0 and "Toy number" in out, error


def test_a_stranger_needs_the_checkpoint_alone(tuned):
    recommender = Recommender.from_pretrained(tuned, data_path=None)
    (ranked,) = recommender.recommend([["1", "2", "3"]], k=1)
    assert ranked[0].item == "4" and recommender.dataset.title("4") == "Toy number 4"


def test_an_index_that_was_changed_in_the_checkpoint(asked, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "changed", ignore=shutil.ignore_patterns("checkpoint-*"))
    file = tmp_path / "changed" / FILES["index"]
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"0": index["1"], "1": index["0"]}))
    assert "index.json: was changed after training" in asked(ckpt=tmp_path / "changed")[3]
    file.write_text(json.dumps(index | {"0": 3}))
    assert "index.json: '0' has the value '3'" in asked(ckpt=tmp_path / "changed")[3]


def test_a_checkpoint_of_an_earlier_version_opens(asked, tuned, tmp_path, rewrite):
    shutil.copytree(tuned, tmp_path / "old", ignore=shutil.ignore_patterns("checkpoint-*", *FILES.values()))
    metadata = replace(CheckpointMetadata.load(tmp_path / "old"), version=1)
    metadata.save(tmp_path / "old")
    assert not (tmp_path / "old" / FILES["index"]).exists()
    assert asked(ckpt=tmp_path / "old")[0] == 0
    rewrite("inter", lambda inter: {user: history[:-2] for user, history in inter.items()})
    assert "60 of 60 test targets" in asked(ckpt=tmp_path / "old")[3]


def test_results_of_two_checkpoints_have_two_names(tuned, data, tmp_path, script, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(test_script, "write_report", lambda *_: "nowhere")
    for folder in ("ckpt/toy/lcrec", "ckpt/toy/seed2", "other/lcrec"):
        shutil.copytree(tuned, tmp_path / folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    for folder in ("ckpt/toy/lcrec", "ckpt/toy/seed2"):
        code, out, error = script(test_script.main, "--ckpt_path", folder, "--data_path", data, *FEW)
        assert code == 0 and "will be replaced" not in out, error
    assert {path.name for path in (tmp_path / "results/toy").glob("*.json")} == {"lcrec.json", "seed2.json"}
    message = refused(test_script.main, "--ckpt_path", "other/lcrec", "--data_path", data, *FEW)
    assert f"results/toy/lcrec.json: has results of {tmp_path / 'ckpt/toy/lcrec'}" in message
    assert (
        "will be replaced" in script(test_script.main, "--ckpt_path", "ckpt/toy/lcrec", "--data_path", data, *FEW)[1]
    )

    given = ("--results_file", "results/toy/lcrec.json", "--ckpt_path", "other/lcrec")
    out = script(test_script.main, *given, "--data_path", data, *FEW)[1]
    assert f"earlier results of {tmp_path / 'ckpt/toy/lcrec'} will be replaced" in out


@pytest.mark.parametrize(
    "flag, name, problem",
    [
        ("--results_file", "toy.item.json", "holds no results"),
        ("--results_file", "notes.txt", "holds no results"),
        ("--predictions_file", "toy.inter.json", "holds no predictions"),
        ("--predictions_file", "notes.txt", "holds no predictions"),
    ],
)
def test_files_of_another_kind_are_not_replaced(tuned, data, tmp_path, refused, flag, name, problem):
    (data / "toy/notes.txt").write_text("mine")
    before = (data / "toy" / name).read_bytes()
    flags = ("--ckpt_path", tuned, "--data_path", data, *FEW, "--results_file", tmp_path / "r.json")
    message = refused(test_script.main, *flags, flag, data / "toy" / name)
    assert f"{name}: exists and {problem}; name another {flag}" in message
    assert (data / "toy" / name).read_bytes() == before and not (tmp_path / "r.json").exists()


def test_default_names_of_results(tmp_path):
    assert default_results_file("ckpt/D/lcrec", "D").as_posix() == "results/D/lcrec.json"
    assert default_results_file("ckpt/D/lcrec/", "D", "itemsearch").as_posix() == "results/D/lcrec-itemsearch.json"
    assert default_results_file("ckpt/D/lcrec/checkpoint-9", "D").as_posix() == "results/D/lcrec-checkpoint-9.json"


def test_a_training_resumes_with_the_base_model_it_began_with(workshop, tmp_path, refused):
    shutil.copytree(workshop / "base", tmp_path / "base")
    more = (
        "--base_model",
        tmp_path / "base",
        "--max_steps",
        2,
        "--save_and_eval_strategy",
        "steps",
        "--save_steps",
        1,
    )
    more += ("--max_eval_samples", 4)
    run_main(finetune.main, *flags(workshop, tmp_path / "out", *more))
    size = ("--vocab_size", 320, "--hidden_size", 64, "--layers", 2, "--attention_dropout", 0, "--seed", 1, "--force")
    where = ("--dataset", "toy", "--data_path", workshop / "datasets", "--output_dir", tmp_path / "base")
    run_main(scratch.main, *where, *size)
    message = refused(finetune.main, *flags(workshop, tmp_path / "out", *more, "--resume_from_checkpoint", "auto"))
    assert "was tuned from another base model than" in message and "its weights are others" in message
