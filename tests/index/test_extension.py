"""index.generate --extend: old semantic IDs stay, new items get free ones, embedded as the old items were."""

import hashlib
import json

import numpy as np
import pytest
import torch

from index import embed, generate, train
from index.collaborative import JoinedEmbedding
from index.collisions import assign_free_codes, count_collisions
from index.embed import svd_path
from reclingua.datasets.interactions import open_interactions
from reclingua.utils.errors import InputError
from reclingua.utils.provenance import read_record
from tests.helpers.toys import write_toy

ITEMS = 40


@pytest.fixture
def extend(tmp_path, script, monkeypatch):
    """A dataset with an RQ-VAE and an index; extend(*flags) runs index.generate --extend."""

    def embed_text(texts, plm):
        seeds = (int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) for text in texts)
        return np.stack([np.random.default_rng(seed).normal(size=8) for seed in seeds]).astype(np.float32)

    monkeypatch.setattr(embed, "embed_text", embed_text)
    folder = write_toy(tmp_path / "datasets", users=30, items=ITEMS)
    (folder / "toy.index.json").unlink()
    source = ("--dataset", "toy", "--data_path", tmp_path / "datasets")
    small = ("--epochs", 3, "--codebook_sizes", 16, 16, 16, "--hidden_sizes", 16, "--code_dim", 4)
    embeddings, rqvae = folder / "toy.emb-minilm-td.npy", tmp_path / "rqvae"
    for call in (
        (embed.main, *source, "--collab_weight", 0.5, "--collab_dim", 4),
        (train.main, "--embeddings", embeddings, "--output_dir", rqvae, *small),
        (generate.main, *source, "--rqvae", rqvae),
    ):
        code, _, error = script(*call)
        assert code == 0, error
    return lambda *flags: script(generate.main, *source, "--extend", folder / "toy.index.json", *flags)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "datasets/toy"


def add_items(folder, number, first=ITEMS):
    path = folder / "toy.item.json"
    new = {str(item): {"title": f"New toy {item}"} for item in range(first, first + number)}
    path.write_text(json.dumps(json.loads(path.read_text()) | new))


def rewrite(folder, name, change):
    path = folder / f"toy.{name}.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_new_items_are_embedded_by_the_same_text_fields(extend, folder, script, refused):
    path, source = folder / "brands.npy", ("--dataset", "toy", "--data_path", folder.parent)
    flags = (*source, "--output", path, "--text_fields", "brand,title")
    rewrite(folder, "item", lambda items: {item: {"brand": "Acme", **texts} for item, texts in items.items()})
    assert script(embed.main, *flags)[0] == 0
    dataset, stored = open_interactions(folder.parent, "toy"), np.load(path)
    texts = [f"Acme. {dataset.title(item)}" for item in dataset.item_ids]
    assert np.allclose(stored, embed.embed_text(texts, "minilm"))
    assert np.allclose(embed.embed_new_items(path, dataset, dataset.item_ids[:3]), stored[:3])
    rewrite(folder, "item", lambda items: items | {"0": items["0"] | {"brand": "Other"}})  # title and description stay
    assert "it was made with another items" in refused(embed.main, *flags)
    line = refused(embed.main, *source, "--text_fields", "title,colour")
    assert "no item of" in line and "has the field 'colour'; it has brand, title" in line
    assert "has title twice" in refused(embed.main, *source, "--text_fields", "title,title")


@pytest.mark.parametrize("number", [1, 10, 100, 1000])
def test_old_items_keep_their_semantic_ids_and_new_ones_get_free_ones(extend, folder, number):
    path = folder / "toy.index.json"
    before = path.read_text()
    add_items(folder, number)
    code, out, error = extend()
    assert code == 0 and f"{number:,} items of {folder} are not in" in out, error
    assert path.read_text().startswith(before.rstrip()[:-1])  # byte for byte
    index, old = open_interactions(folder.parent, "toy", ["index"]).index, json.loads(before)
    assert len(index) == ITEMS + number == len(set(map(tuple, index.values())))
    for level in range(3):  # no code that a model tuned on the old index has no token for
        assert {tokens[level] for tokens in index.values()} == {tokens[level] for tokens in old.values()}


def test_one_extension_or_two_make_the_same_index(extend, folder):
    path = folder / "toy.index.json"
    before = path.read_bytes(), path.with_suffix(".run.json").read_bytes()
    add_items(folder, 5)
    assert extend()[0] == 0
    add_items(folder, 5, first=ITEMS + 5)
    assert extend()[0] == 0
    twice = path.read_bytes()
    assert extend()[0] == 0 and path.read_bytes() == twice  # nothing is new
    path.write_bytes(before[0])
    path.with_suffix(".run.json").write_bytes(before[1])
    assert extend()[0] == 0 and path.read_bytes() == twice
    assert "extends_sha256" in read_record(path)


def test_the_nearest_free_codes_of_those_in_use():
    from tests.index.test_index import make_rqvae

    model = make_rqvae((2, 3), width=1)
    for book, values in zip(model.codebooks, ([[0.0], [10.0]], [[0.0], [1.0], [2.0]]), strict=True):
        book.copy_(torch.tensor(values))
    codes = np.array([[0, 0], [1, 1]])  # nothing has the last code 2
    new = assign_free_codes(model, torch.tensor([[2.0], [0.1]]), codes)
    assert new.tolist() == [[0, 1], [1, 0]]
    assert count_collisions(np.concatenate([codes, new])) == 0
    with pytest.raises(InputError, match="3 new items, but 2 semantic IDs of the codes in use are free"):
        assign_free_codes(model, torch.zeros(3, 1), codes)


def test_the_embedding_of_old_items_does_not_matter(extend, folder):
    add_items(folder, 3)
    assert extend("--output", folder / "computed.index.json")[0] == 0
    dataset, embeddings = open_interactions(folder.parent, "toy"), folder / "all.npy"
    new = embed.embed_new_items(folder / "toy.emb-minilm-td.npy", dataset, dataset.item_ids[ITEMS:])
    np.save(embeddings, np.concatenate([np.zeros((ITEMS, 12), np.float32), new]))
    assert extend("--output", folder / "given.index.json", "--embeddings", embeddings)[0] == 0
    assert (folder / "computed.index.json").read_bytes() == (folder / "given.index.json").read_bytes()


def test_new_items_are_folded_into_the_svd(extend, folder):
    path = folder / "toy.emb-minilm-td.npy"
    dataset, embeddings = open_interactions(folder.parent, "toy"), np.load(path)
    folded = embed.embed_new_items(path, dataset, dataset.item_ids)  # as if all of them were new
    has_users = [any(item in history for history in dataset.train_histories.values()) for item in dataset.item_ids]
    assert 0 < sum(has_users) < ITEMS  # the others get what their neighbours in text have
    assert np.allclose(folded[has_users], embeddings[has_users], atol=1e-4)

    add_items(folder, 2)  # the users of item 5 take the first of them, nobody the second
    rewrite(
        folder,
        "inter",
        lambda inter: {user: [*([ITEMS] if 5 in items else []), *items] for user, items in inter.items()},
    )
    dataset = open_interactions(folder.parent, "toy")
    similar, isolated = embed.embed_new_items(path, dataset, [str(ITEMS), str(ITEMS + 1)])
    nearest = np.argsort(-embeddings[:, :8] @ isolated[:8])[:10]
    mean = embeddings[nearest, 8:].mean(0)
    assert np.allclose(isolated[8:], 0.5 * mean / np.linalg.norm(mean), atol=1e-6)
    assert folded[5, 8:] @ similar[8:] > 0.9 * 0.5**2  # their cosine


def test_bad_svds(extend, folder, tmp_path):
    path = svd_path(folder / "toy.emb-minilm-td.npy")
    add_items(folder, 1)
    before, index = path.read_bytes(), (folder / "toy.index.json").read_bytes()
    joined = JoinedEmbedding.load(path)
    JoinedEmbedding(joined.users, joined.components + 1, joined.text_mean, joined.interaction_mean, 0.5).save(path)
    assert "is not the SVD of toy.emb-minilm-td.npy" in extend()[2]
    JoinedEmbedding(joined.users[1:], joined.components, joined.text_mean, joined.interaction_mean, 0.5).save(path)
    assert "its SVD does not fit its users" in extend()[2]
    path.write_bytes(before[:100])
    assert "contains no SVD of index.embed" in extend()[2]
    path.unlink()
    code, _, error = extend()
    assert code == 2 and "svd.safetensors: no such file" in error and error.count("\n") == 1
    assert (folder / "toy.index.json").read_bytes() == index


def test_bad_input_of_extend(extend, folder, tmp_path, script, refused):
    path = folder / "toy.index.json"
    add_items(folder, 1)
    before, record = path.read_text(), path.with_suffix(".run.json").read_text()

    def refuse(*flags):
        code, _, error = extend(*flags)
        assert code == 2 and error.count("\n") == 1, error
        return error

    assert "--extend has no effect with --random" in refuse("--random")
    assert "--seed has no effect" in refuse("--seed", 1)
    assert "contains no RQ-VAE" in refuse("--rqvae", tmp_path)
    np.save(tmp_path / "few.npy", np.zeros((3, 12), np.float32))
    assert "has shape [3, 12]" in refuse("--embeddings", tmp_path / "few.npy")
    np.save(tmp_path / "narrow.npy", np.zeros((ITEMS + 1, 3), np.float32))
    assert "expects embeddings of width 12, got width 3" in refuse("--embeddings", tmp_path / "narrow.npy")
    assert path.read_text() == before

    path.write_text(before.replace("<c_", "<d_"))  # of others, so without a record of its RQ-VAE
    assert "does not state its RQ-VAE; name the folder by --rqvae" in refuse()
    assert "item '0' has <a_" in (error := refuse("--rqvae", tmp_path / "rqvae")) and "16, 16, 16 codes" in error
    path.write_text(json.dumps(json.loads(before) | {"0": json.loads(before)["1"]}))
    assert "items '0' and '1' share the index" in refuse("--rqvae", tmp_path / "rqvae")
    path.write_text(before)
    path.with_suffix(".run.json").write_text(record)

    rewrite(folder, "item", lambda items: items | {"3": items["4"], "4": items["3"]})
    assert "its items have other texts in" in refuse()
    assert extend("--force", "--output", folder / "forced.index.json")[0] == 0
    rewrite(folder, "item", lambda items: {item: texts for item, texts in items.items() if item != "39"})
    rewrite(folder, "inter", lambda inter: {user: [i for i in items if i != 39] for user, items in inter.items()})
    assert "item '39' is not in toy.item.json" in refuse()
    assert path.read_text() == before


def test_an_index_of_another_rqvae_or_embeddings(extend, folder, tmp_path, script):
    add_items(folder, 1)
    small = ("--epochs", 2, "--codebook_sizes", 16, 16, 16, "--hidden_sizes", 16, "--code_dim", 4, "--seed", 7)
    embeddings = folder / "toy.emb-minilm-td.npy"
    assert script(train.main, "--embeddings", embeddings, "--output_dir", tmp_path / "other", *small)[0] == 0
    assert "is not the RQ-VAE that" in extend("--rqvae", tmp_path / "other")[2]
    np.save(embeddings, np.zeros((ITEMS, 12), np.float32))
    assert f"{embeddings}: is not the file that" in extend()[2]
