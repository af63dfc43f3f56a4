"""Derived files state what they were made from: stale ones are refused, different ones are not replaced silently."""

import json
import shutil

import numpy as np
import pytest

from index import embed, generate, repair, train
from reclingua.datasets.derived_files import print_stale_files
from reclingua.datasets.interactions import open_interactions
from reclingua.datasets.user_texts import UserTexts, read_user_texts, write_user_texts
from reclingua.utils.errors import InputError
from reclingua.utils.provenance import read_record, record_path, write_record

SMALL = ("--epochs", 2, "--codebook_sizes", 3, 4, "--hidden_sizes", 16, "--code_dim", 4)


@pytest.fixture
def commands(toy, tmp_path, script, monkeypatch):
    """commands(module, *flags): run a command of index/ on the toy dataset; an encoder of 8 numbers for each name."""

    def embed_text(texts, plm):
        return np.random.default_rng(len(plm)).normal(size=(len(texts), 8)).astype(np.float32)

    monkeypatch.setattr(embed, "embed_text", embed_text)
    (toy / "toy/toy.index.json").unlink()

    def run(module, *flags):
        source = () if module in (train, repair) else ("--dataset", "toy", "--data_path", toy)
        return script(module.main, *source, *flags)

    return run


@pytest.fixture
def made(commands, toy, tmp_path):
    """The toy dataset with embeddings and an index, and the flags of its RQ-VAE."""
    embeddings, rqvae = toy / "toy/toy.emb-minilm-td.npy", tmp_path / "rqvae"
    for call in (
        (embed,),
        (train, "--embeddings", embeddings, "--output_dir", rqvae, *SMALL),
        (generate, "--rqvae", rqvae),
    ):
        code, _, error = commands(*call)
        assert code == 0, error
    return embeddings, ("--rqvae", rqvae)


def replace_item(items):
    """One item leaves and one comes: with ids in order every later item moves by one place."""
    titles = [record["title"] for record in items.values()]
    return {item: {"title": title} for item, title in zip(items, [*titles[:3], *titles[4:], "New one"], strict=True)}


def test_the_same_command_again_is_no_replacement(commands, toy, made):
    _, rqvae = made
    index = (toy / "toy/toy.index.json").read_bytes()
    for call in ((embed,), (generate, *rqvae)):
        assert commands(*call)[0] == 0
    assert (toy / "toy/toy.index.json").read_bytes() == index


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (embed, ("--collab_weight", 0.5), "another collab_weight (0.0, now 0.5)"),
        (generate, ("--random", "--codebook_sizes", 3, 4), "another random_codebook_sizes (None, now [3, 4])"),
    ],
)
def test_another_file_is_replaced_with_force_alone(commands, toy, made, module, flags, message):
    before = {path.name: path.read_bytes() for path in (toy / "toy").iterdir()}
    code, _, error = commands(module, *flags)
    assert code == 2 and message in error and "give --force" in error
    assert {path.name: path.read_bytes() for path in (toy / "toy").iterdir()} == before
    assert commands(module, *flags, "--force")[0] == 0
    assert {path.name: path.read_bytes() for path in (toy / "toy").iterdir()} != before


def test_an_index_of_others_is_replaced_with_force_alone(commands, toy):
    published = {str(item): [f"<a_{item}>"] for item in range(9)}
    (toy / "toy/toy.index.json").write_text(json.dumps(published))
    random = (generate, "--random", "--codebook_sizes", 3, 3)
    assert "no record states what it was made from; give --force" in commands(*random)[2]
    assert open_interactions(toy, "toy", ["index"]).index == published
    assert commands(*random, "--force")[0] == 0


def test_an_rqvae_is_replaced_with_force_alone(commands, made):
    embeddings, (_, rqvae) = made
    again = (train, "--embeddings", embeddings, "--output_dir", rqvae, *SMALL)
    assert commands(*again)[0] == 0
    assert "another seed (42, now 7)" in commands(*again, "--seed", 7)[2]
    assert commands(*again, "--seed", 7, "--force")[0] == 0


@pytest.mark.parametrize("name", ["config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors"])
def test_another_model_is_not_replaced_by_an_rqvae(commands, made, tmp_path, name):
    embeddings, _ = made
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / name).write_text("{}")
    flags = ("--embeddings", embeddings, "--output_dir", tmp_path / "tuned", *SMALL)
    code, _, error = commands(train, *flags)
    assert code == 2 and "no record states what it was made from; give --force" in error
    assert [path.name for path in (tmp_path / "tuned").iterdir()] == [name]


def test_an_rqvae_stays_until_the_next_is_complete(commands, made, tmp_path, monkeypatch):
    embeddings, (_, rqvae) = made
    before = {path.name: path.read_bytes() for path in rqvae.iterdir()}

    def fail(model, folder):
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.RQVAE, "save_pretrained", fail)
    code, _, error = commands(train, "--embeddings", embeddings, "--output_dir", rqvae, *SMALL, "--seed", 7, "--force")
    assert code == 2 and "No space left on device" in error
    assert {path.name: path.read_bytes() for path in rqvae.iterdir()} == before
    assert not [path for path in rqvae.parent.iterdir() if path.name.endswith(".tmp")]


def test_semantic_ids_are_made_of_the_embeddings_that_the_rqvae_was_trained_on(commands, toy, tmp_path, made):
    assert commands(embed, "--plm", "other-encoder")[0] == 0
    other, rqvae = toy / "toy/toy.emb-other-encoder-td.npy", tmp_path / "other"
    assert commands(train, "--embeddings", other, "--output_dir", rqvae, *SMALL)[0] == 0
    index = toy / "toy/toy.other.index.json"
    assert commands(generate, "--rqvae", rqvae, "--output", index)[0] == 0
    record = read_record(index)
    assert record["embeddings_sha256"] == read_record(rqvae)["embeddings_sha256"]
    default = made[0]
    code, _, error = commands(generate, "--rqvae", rqvae, "--embeddings", default, "--output", index)
    assert code == 2 and f"{default}: is not the file that {rqvae} was trained on" in error
    np.save(other, np.load(default))
    assert (
        f"{other}: is not the file that {rqvae} was trained on"
        in commands(generate, "--rqvae", rqvae, "--output", index)[2]
    )


def test_data_and_models_can_be_moved(commands, toy, tmp_path, made, script):
    shutil.move(toy, tmp_path / "moved")
    shutil.move(tmp_path / "rqvae", tmp_path / "rqvae-moved")
    source = ("--dataset", "toy", "--data_path", tmp_path / "moved", "--rqvae", tmp_path / "rqvae-moved")
    code, _, error = script(generate.main, *source)
    assert code == 0, error


def test_files_of_other_items_are_stale(commands, toy, edit, made, capsys):
    texts = toy / "toy/toy.user.json"
    write_user_texts(texts, UserTexts({"0": ["likes toys"]}))
    dataset = open_interactions(toy, "toy", ["items", "index"])
    write_record(texts, {part: dataset.sha256(part) for part in ("items", "histories")}, {})
    assert read_user_texts(dataset).preferences
    print_stale_files(toy, "toy")
    assert not capsys.readouterr().out

    edit("item", replace_item)
    stale = "was made from other items"
    with pytest.raises(InputError, match=f"toy.index.json: {stale} .*python -m index.generate"):
        open_interactions(toy, "toy", ["index"])
    code, _, error = commands(generate, *made[1])
    assert code == 2 and f"{made[0]}: {stale}" in error and "python -m index.embed --force" in error
    with pytest.raises(InputError, match=f"toy.user.json: {stale} .*python -m data.intentions"):
        read_user_texts(open_interactions(toy, "toy"))
    print_stale_files(toy, "toy")
    printed = capsys.readouterr().out
    assert printed.count(stale) == 3 and "toy.emb-minilm-td.npy" in printed and "python -m index.generate" in printed


def test_embeddings_of_other_interactions_are_stale(commands, edit, made):
    assert commands(embed, "--collab_weight", 0.5, "--force")[0] == 0
    edit("inter", lambda inter: {user: history[::-1] for user, history in inter.items()})
    assert "was made from other training histories" in commands(generate, *made[1])[2]


def test_a_record_of_an_earlier_file_is_not_that_of_its_successor(commands, toy, edit, made, capsys):
    edit("item", replace_item)
    published = {str(item): [f"<a_{item}>"] for item in range(9)}
    (toy / "toy/toy.index.json").write_text(json.dumps(published))
    assert open_interactions(toy, "toy", ["index"]).index == published
    print_stale_files(toy, "toy")
    assert "toy.index.json does not state what it was made from" in capsys.readouterr().out


def test_an_old_rqvae_opens_with_a_line(commands, tmp_path, made):
    run = tmp_path / "rqvae/run.json"
    run.write_text(json.dumps({key: value for key, value in json.loads(run.read_text()).items() if key == "curve"}))
    code, out, _ = commands(generate, *made[1], "--force")
    assert code == 0 and "does not state its embeddings" in out


def test_a_repaired_index_stays_bound_to_its_items(commands, toy, edit, made):
    index, repaired = toy / "toy/toy.index.json", toy / "toy/toy.mine.index.json"
    assert commands(repair, index, "--output", repaired)[0] == 0
    assert record_path(repaired).name == "toy.mine.index.run.json"
    edit("item", replace_item)
    with pytest.raises(InputError, match="was made from other items"):
        open_interactions(toy, "toy", ["index"], ".mine.index.json")
