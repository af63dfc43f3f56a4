"""--init_from: training of a checkpoint continues on new interactions, for every method.

At a learning rate of 0 the continued model is the earlier one, which shows that all its weights are taken over.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import finetune
import pretrain
import test as test_script
from reclingua import Recommender, Scorer
from reclingua.models.collaborative import copy_known_rows, load_collaborative
from reclingua.utils.errors import InputError
from reclingua.utils.metadata import CheckpointMetadata
from tests.helpers.scripts import QUICK, flags, run_main, tune
from tests.helpers.toys import write_preferences
from tests.helpers.yes_no_models import make_cf_model

FEW = ("--max_steps", 2, "--save_and_eval_strategy", "no")


def weights(folder):
    return {name: w for file in sorted(folder.glob("*model*.safetensors")) for name, w in load_file(file).items()}


# ---- lcrec ----


@pytest.fixture(scope="module")
def grown_toy(workshop, tmp_path_factory):
    """The toy dataset with a new item, a new user, and a further interaction of each user."""
    root = tmp_path_factory.mktemp("grown")
    shutil.copytree(workshop / "datasets", root, dirs_exist_ok=True)
    for name, change in (
        ("item", lambda items: items | {"9": {"title": "Toy number 9"}}),
        ("index", lambda index: index | {"9": ["<a_0>", "<a_1>"]}),
        ("inter", lambda inter: {user: [*items, 9] for user, items in inter.items()} | {"new": [9, 0, 9, 1]}),
    ):
        path = root / f"toy/toy.{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return root


@pytest.fixture(scope="module")
def checkpoints(workshop, tuned):
    """A checkpoint with all weights, and one of LoRA weights."""
    learn = ("--lora", "--lora_r", 4, "--targets", "all", "--max_his_len", 3, "--his_sep", "")
    run_main(finetune.main, *flags(workshop, workshop / "adapter", *learn, *FEW))
    return {"full": tuned, "lora": workshop / "adapter"}


def continue_lcrec(data, checkpoint, output, *more):
    where = ("--dataset", "toy", "--data_path", data, "--output_dir", output, "--init_from", checkpoint)
    return *where, *QUICK, "--targets", "all", "--max_his_len", 3, "--his_sep", "", *FEW, *more


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_lcrec_continues_on_new_interactions(script, workshop, grown_toy, checkpoints, tmp_path, kind):
    first, same, further = checkpoints[kind], tmp_path / "same", tmp_path / "further"
    code, out, error = script(finetune.main, *continue_lcrec(grown_toy, first, same, "--learning_rate", 0))
    assert code == 0 and f"training of {first} continues; 1 items are new" in out, error
    assert "0 new tokens" in out and "OTHER" not in out and "was 'all'" not in out
    before, after = weights(first), weights(same)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    metadata, initial = CheckpointMetadata.load(same), CheckpointMetadata.load(first)
    assert metadata.lora == initial.lora and "9" in metadata.index
    assert metadata.base_model == str(first if kind == "full" else workshop / "base")
    (ranked,), (expected,) = (
        Recommender.from_pretrained(folder, grown_toy, index_file=".index.json").recommend([["1", "2"]], k=10)
        for folder in (same, first)
    )
    assert ranked == expected

    code, out, error = script(finetune.main, *continue_lcrec(grown_toy, first, further, "--his_sep", ", "))
    assert code == 0 and "--his_sep was '', and is ', ' now" in out, error
    assert any(not torch.equal(weight, before[name]) for name, weight in weights(further).items())
    where = ("--ckpt_path", further, "--data_path", grown_toy, "--results_file", tmp_path / "results.json")
    assert script(test_script.main, *where, "--num_beams", 5, "--metrics", "hit@5")[0] == 0


def test_bad_input_of_lcrec(workshop, studio, grown_toy, checkpoints, tmp_path, refused):
    def refuse(checkpoint, *more, data=grown_toy):
        return refused(finetune.main, *continue_lcrec(data, checkpoint, tmp_path / "out", *more))

    full, lora = checkpoints["full"], checkpoints["lora"]
    assert "was made by 'tallrec'; give one of lcrec" in refuse(studio / "tallrec")
    assert "reclingua.json: no such file" in refuse(tmp_path)
    assert "has all weights; leave it out" in refuse(full, "--base_model", workshop / "base")
    assert "whose LoRA weights are trained further; leave it out" in refuse(lora, "--lora_r", 16)
    assert "is not the base model that" in refuse(lora, "--base_model", full)
    shutil.copytree(grown_toy, tmp_path / "data")
    path = tmp_path / "data/toy/toy.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"9": ["<a_0>", "<b_9>"]}))
    assert "the code '<b_9>' of item '9' is new" in refuse(full, data=tmp_path / "data")
    path.write_text(json.dumps(index | {"0": index["1"], "1": index["0"]}))
    assert "item '0' has <a_0><b_1> instead of <a_0><b_0>" in refuse(lora, data=tmp_path / "data")
    assert not list((tmp_path / "out").glob("*"))


# ---- Yes/No methods ----


@pytest.fixture(scope="module")
def grown(studio, tmp_path_factory):
    """The ratings of `studio` and those of four further users; its collaborative models, continued on them."""
    root = tmp_path_factory.mktemp("grown")
    write_preferences(root, users=44)
    for kind, epochs in (("mf", 2), ("hash", 52)):
        where = ("--output_dir", root / kind, "--results_file", root / f"{kind}.json", "--data_path", root)
        size = ("--embedding_size", 16, "--epochs", epochs, "--dataset", "liked")
        run_main(pretrain.main, "--model", kind, "--init_from", studio / kind, *where, *size)
    return root


@pytest.mark.parametrize(
    "method, more",
    [
        ("tallrec", ()),
        ("binllm", ()),
        ("collm", ()),
        ("collm", ("--train_cf_model", "--lora")),
        ("cora", ()),
        ("personprompt", ()),
    ],
)
def test_yes_no_methods_continue_on_new_ratings(script, studio, grown, tmp_path, method, more):
    first, same = tmp_path / "first", tmp_path / "same"
    few = (*more, "--train_data_sample_num", 64, *FEW)
    code, _, error = script(finetune.main, *tune(studio, method, first, "--init_from", studio / "tallrec", *few))
    assert code == 0, error
    code, _, error = script(
        finetune.main, *tune(grown, method, same, "--init_from", first, *few, "--learning_rate", 0)
    )
    assert code == 0, error
    before, after = weights(first), weights(same)
    assert before.keys() == after.keys()
    for name, weight in before.items():  # tables of users have further rows
        assert torch.equal(after[name][: len(weight)], weight)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, same)]
    for key in ("offset", "saved", "trained", "lora"):
        assert configs[0][key] == configs[1][key]
    scorer = Scorer.from_pretrained(same, grown)
    assert len(scorer.score([["1", "3"]], ["5"], ["44"])) == 1  # of a user that the first training did not know


def test_bad_input_of_yes_no_methods(studio, grown, tmp_path, refused):
    def refuse(method, checkpoint, *more):
        return refused(finetune.main, *tune(grown, method, tmp_path / "out", "--init_from", checkpoint, *more))

    shutil.copytree(studio / "tallrec", tmp_path / "cora", ignore=shutil.ignore_patterns("checkpoint-*"))
    path = tmp_path / "cora/reclingua.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "cora"}))
    assert "was made by 'cora'; give one of tallrec or collm" in refuse("collm", tmp_path / "cora")
    assert "was made by 'cora'; give one of tallrec" in refuse("tallrec", tmp_path / "cora")
    assert "knows users up to 40" in refuse("collm", studio / "tallrec", "--cf_model", studio / "mf")
    collm = tune(grown, "collm", tmp_path / "collm", "--init_from", studio / "tallrec", "--soft_tokens", 2, *FEW)
    run_main(finetune.main, *collm)
    assert "its weight maps.16.2.weight has the shape [128, 160]" in refuse("collm", tmp_path / "collm")
    assert not list((tmp_path / "out").glob("*"))


def test_tables_of_collaborative_models_grow(studio, grown, tmp_path, refused):
    sizes = [load_collaborative(folder / "mf").config.num_users for folder in (studio, grown)]
    assert sizes == [41, 45]
    small, wide = make_cf_model(), make_cf_model()
    copy_known_rows(small, wide.state_dict(), "wide")
    with pytest.raises(InputError, match=r"folder: its weight user_embedding.weight is of shape \[45, 16\]"):
        copy_known_rows(small, load_collaborative(grown / "mf").state_dict(), "folder")
    where = ("--dataset", "liked", "--data_path", grown, "--output_dir", tmp_path / "out")
    assert "is missing, but should be" in refused(
        pretrain.main, "--model", "din", *where, "--embedding_size", 16, "--init_from", grown / "mf"
    )
    next_item = ("--model", "sasrec", "--task", "next_item", "--init_from", grown / "mf")
    assert "without --sweep and --init_from" in refused(pretrain.main, *where, *next_item)
