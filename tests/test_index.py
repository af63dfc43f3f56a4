"""RQ-VAE against the reference's numbers; indices that never collide."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dataset import open_dataset
from errors import InputError
from index import embed, generate, train
from index.collisions import colliding, move_to_free, spread
from index.rqvae import RQVAE, RQVAEConfig


@pytest.fixture
def golden(shared):
    return np.load(shared / "golden" / "rqvae.npz")


@pytest.fixture
def reference(golden):
    """An RQ-VAE with the weights of the reference run."""
    model = RQVAE(RQVAEConfig(24, (32, 16), 8, (16,) * 4))
    state = {name: torch.from_numpy(golden[name]) for name in golden if name.startswith(("encoder", "decoder"))}
    state |= {f"codebooks.{level}": torch.from_numpy(golden[f"codebook.{level}"]) for level in range(4)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert sorted(missing) == ["scale", "shift"] and not unexpected
    return model


def test_forward_pass_agrees_with_the_reference(golden, reference):
    x = torch.from_numpy(golden["x"])
    nearest = reference(x, balanced=False)
    assert (nearest.codes.numpy() == golden["indices_nearest"]).all()
    assert nearest.rq_loss.item() == pytest.approx(float(golden["rq_loss_nearest"]), abs=1e-5)
    assert nearest.reconstruction_loss.item() == pytest.approx(float(golden["reconstruction_mse"]), abs=1e-5)
    assert np.allclose(nearest.reconstruction.detach(), golden["reconstruction"], atol=1e-5)
    balanced = reference(x)
    assert (balanced.codes.numpy() == golden["indices_sinkhorn"]).all()
    assert balanced.rq_loss.item() == pytest.approx(float(golden["rq_loss_sinkhorn"]), abs=1e-5)


def test_gradient_passes_the_codes_by(reference, golden):
    x = torch.from_numpy(golden["x"])
    latent = reference.encode(x).detach().requires_grad_()
    quantized, codes, _ = reference.quantize(latent, balanced=False)
    chosen = sum(book[codes[:, level]] for level, book in enumerate(reference.codebooks))
    assert torch.allclose(quantized, chosen, atol=1e-6)
    quantized.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))


def test_saved_and_reloaded_gives_the_same(reference, golden, tmp_path):
    x = torch.from_numpy(golden["x"])
    reference.fit_scale(x)
    reference.save_pretrained(tmp_path)
    assert torch.equal(RQVAE.from_pretrained(tmp_path)(x).reconstruction, reference(x).reconstruction)


def model_of(sizes, width=4, seed=0, epsilon=0.003):
    torch.manual_seed(seed)
    model = RQVAE(RQVAEConfig(width, (), width, sizes, sinkhorn_epsilon=epsilon)).requires_grad_(False)
    for book in model.codebooks:
        book.normal_()
    return model


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 5), min_size=1, max_size=3), st.integers(0, 99), st.sampled_from([0.0, 0.003]), st.data()
)
def test_every_item_gets_an_index_of_its_own(sizes, seed, epsilon, data):
    items = data.draw(st.integers(1, int(np.prod(sizes))))
    model = model_of(sizes, seed=seed, epsilon=epsilon)
    latents = torch.randn(items, 4) * data.draw(st.sampled_from([0.0, 0.1, 1.0]))  # 0: all items are alike
    nearest = model.quantize(latents, balanced=False)[1].numpy()
    codes = move_to_free(model, latents, spread(model, latents, nearest))
    assert colliding(codes) == 0
    assert (codes >= 0).all() and (codes < np.array(sizes)).all()


def test_the_nearest_item_keeps_the_index_and_the_others_move_as_stated():
    model = model_of((2, 2), width=1)
    for book, values in zip(model.codebooks, ([[0.0], [10.0]], [[0.0], [1.0]]), strict=True):
        book.copy_(torch.tensor(values))
    latents = torch.tensor([[0.2], [0.1], [0.3], [9.9]])  # three at (0, 0), one at (1, 0)
    nearest = model.quantize(latents, balanced=False)[1].numpy()
    assert nearest.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]
    # 0.1 stays; 0.2 goes to the other last code; 0.3 finds both taken and goes to the next prefix, where (1, 0) is
    # taken and (1, 1) free.
    assert move_to_free(model, latents, nearest).tolist() == [[0, 1], [0, 0], [1, 1], [1, 0]]


def test_more_items_than_indices():
    model = model_of((2, 2))
    with pytest.raises(InputError, match="5 items do not fit into 4 indices"):
        move_to_free(model, torch.zeros(5, 4), np.zeros((5, 2), dtype=np.int64))


def embeddings_of(toy, width=8):
    path = toy / "toy" / "toy.emb-minilm-td.npy"
    np.save(path, np.random.default_rng(0).normal(size=(9, width)).astype(np.float32))
    return path


def test_train_and_generate(toy, tmp_path, script):
    path, rqvae = embeddings_of(toy), tmp_path / "rqvae"
    flags = ("--epochs", 30, "--codebook_sizes", 3, 4, "--hidden_sizes", 16, "--code_dim", 4)
    code, out, error = script(train.main, "--embeddings", path, "--output_dir", rqvae, *flags)
    assert code == 0, error
    curve = json.loads((rqvae / "run.json").read_text())["curve"]
    assert curve[-1]["reconstruction"] < curve[0]["reconstruction"]
    (toy / "toy/toy.index.json").unlink()
    code, out, error = script(generate.main, "--dataset", "toy", "--data_path", toy, "--rqvae", rqvae)
    assert code == 0 and "0 at the end" in out and "perplexity" in out
    index = open_dataset(toy, "toy", ["items", "index"]).index
    assert len(set(map(tuple, index.values()))) == 9
    assert all(a.startswith("<a_") and b.startswith("<b_") for a, b in index.values())


def test_bad_input_of_the_index_stage(toy, tmp_path, refused, script):
    path, rqvae = embeddings_of(toy), tmp_path / "rqvae"
    assert "no such file" in refused(train.main, "--embeddings", tmp_path / "no.npy", "--output_dir", rqvae)
    where = ("--dataset", "toy", "--data_path", toy, "--rqvae", rqvae)
    assert "holds no RQ-VAE" in refused(generate.main, *where)
    flags = ("--epochs", 1, "--codebook_sizes", 2, 2, "--hidden_sizes", 16, "--code_dim", 4)
    assert script(train.main, "--embeddings", path, "--output_dir", rqvae, *flags)[0] == 0
    before = (toy / "toy/toy.index.json").read_bytes()
    assert "9 items do not fit into 4 indices" in refused(generate.main, *where)
    np.save(path, np.ones((8, 8), np.float32))
    assert "shape [8, 8]" in refused(generate.main, *where)
    np.save(path, np.ones((9, 5), np.float32))
    assert "expects embeddings 8 wide, these are 5 wide" in refused(generate.main, *where)
    assert (toy / "toy/toy.index.json").read_bytes() == before


# ---- index.embed ----


def test_embed_text_and_interactions(toy, script):
    code, out, error = script(
        embed.main, "--dataset", "toy", "--data_path", toy, "--collab_weight", 0.5, "--collab_dim", 4
    )
    assert code == 0, error
    embeddings = np.load(toy / "toy/toy.emb-minilm-td.npy")
    assert embeddings.shape == (9, 388) and embeddings.dtype == np.float32
    text, interactions = embeddings[:, :384], embeddings[:, 384:]
    assert np.allclose(np.linalg.norm(text, axis=1), 0.5) and np.allclose(np.linalg.norm(interactions, axis=1), 0.5)


def test_interaction_vectors_know_training_neighbours_only(toy, edit):
    before = embed.embed_interactions(open_dataset(toy, "toy"), 3)
    edit("inter", lambda inter: {user: [*history[:-2], 0, 0] for user, history in inter.items()})
    assert np.allclose(before, embed.embed_interactions(open_dataset(toy, "toy"), 3))


def test_bad_input_of_embed(toy, edit, refused):
    where = ("--dataset", "toy", "--data_path", toy)
    assert "--collab_weight 2" in refused(embed.main, *where, "--collab_weight", 2)
    assert "no sentence encoder" in refused(embed.main, *where, "--plm", toy)
    edit("item", lambda item: item.update({"3": {"title": ""}}))
    assert "item '3' has neither title nor description" in refused(embed.main, *where)
    assert not (toy / "toy/toy.emb-minilm-td.npy").exists()
