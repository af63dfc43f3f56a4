"""RQ-VAE compared with the reference implementation; semantic IDs by every strategy, without collisions."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from index import embed, generate, repair, train
from index.codes import random_codes
from index.collaborative import JoinedEmbedding
from index.collisions import collision_groups, count_collisions, reassign_by_sinkhorn, resolve_collisions
from index.kmeans import balance, balanced_assignment, balanced_codes, fill_codebooks
from index.repair import deduplicate
from index.rqvae import RQVAE, RQVAEConfig
from reclingua.datasets.interactions import open_interactions
from reclingua.utils.errors import InputError


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
    nearest = reference(x, use_sinkhorn=False)
    assert (nearest.codes.numpy() == golden["indices_nearest"]).all()
    assert nearest.rq_loss.item() == pytest.approx(float(golden["rq_loss_nearest"]), abs=1e-5)
    assert nearest.reconstruction_loss.item() == pytest.approx(float(golden["reconstruction_mse"]), abs=1e-5)
    assert np.allclose(nearest.reconstruction.detach(), golden["reconstruction"], atol=1e-5)
    balanced = reference(x)
    assert (balanced.codes.numpy() == golden["indices_sinkhorn"]).all()
    assert balanced.rq_loss.item() == pytest.approx(float(golden["rq_loss_sinkhorn"]), abs=1e-5)


def test_gradient_is_straight_through(reference, golden):
    x = torch.from_numpy(golden["x"])
    latent = reference.encode(x).detach().requires_grad_()
    quantized, codes, _ = reference.quantize(latent, use_sinkhorn=False)
    chosen = sum(book[codes[:, level]] for level, book in enumerate(reference.codebooks))
    assert torch.allclose(quantized, chosen, atol=1e-6)
    quantized.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))


def test_reloaded_model_gives_the_same_output(reference, golden, tmp_path):
    x = torch.from_numpy(golden["x"])
    reference.fit_scale(x)
    reference.save_pretrained(tmp_path)
    assert torch.equal(RQVAE.from_pretrained(tmp_path)(x).reconstruction, reference(x).reconstruction)


def make_rqvae(sizes, width=4, seed=0, epsilon=0.003):
    torch.manual_seed(seed)
    model = RQVAE(RQVAEConfig(width, (), width, sizes, sinkhorn_epsilon=epsilon)).requires_grad_(False)
    for book in model.codebooks:
        book.normal_()
    return model


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(2, 5), min_size=1, max_size=3), st.integers(0, 99), st.sampled_from([0.0, 0.003]), st.data()
)
def test_every_item_gets_a_unique_semantic_id(sizes, seed, epsilon, data):
    items = data.draw(st.integers(1, int(np.prod(sizes))))
    model = make_rqvae(sizes, seed=seed, epsilon=epsilon)
    latents = torch.randn(items, 4) * data.draw(st.sampled_from([0.0, 0.1, 1.0]))  # 0: all items are equal
    nearest = model.quantize(latents, use_sinkhorn=False)[1].numpy()
    codes = resolve_collisions(model, latents, reassign_by_sinkhorn(model, latents, nearest))
    assert count_collisions(codes) == 0
    assert (codes >= 0).all() and (codes < np.array(sizes)).all()


def test_the_nearest_item_keeps_its_semantic_id_and_the_others_move_as_documented():
    model = make_rqvae((2, 2), width=1)
    for book, values in zip(model.codebooks, ([[0.0], [10.0]], [[0.0], [1.0]]), strict=True):
        book.copy_(torch.tensor(values))
    latents = torch.tensor([[0.2], [0.1], [0.3], [9.9]])  # three at (0, 0), one at (1, 0)
    nearest = model.quantize(latents, use_sinkhorn=False)[1].numpy()
    assert nearest.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]
    # 0.1 stays; 0.2 moves to the other last code; for 0.3 both are occupied, so it moves to the next prefix, where
    # (1, 0) is occupied and (1, 1) free.
    assert resolve_collisions(model, latents, nearest).tolist() == [[0, 1], [0, 0], [1, 1], [1, 0]]


def first_free(point, codebooks, occupied, prefix=()):
    """The search that `resolve_collisions` describes, without a short cut: all semantic IDs in order."""
    if not codebooks:
        return None if prefix in occupied else prefix
    for code in np.argsort(((codebooks[0] - point) ** 2).sum(1), kind="stable").tolist():
        found = first_free(point - codebooks[0][code], codebooks[1:], occupied, (*prefix, code))
        if found is not None:
            return found
    return None


@pytest.mark.parametrize("scale", [0.0, 1e-6, 0.5])  # equal items, nearly equal ones, distinct ones
def test_displaced_items_get_the_first_free_semantic_id_of_the_plain_search(scale):
    model = make_rqvae((3, 4, 5), seed=1)
    latents = torch.randn(1, 4) + scale * torch.randn(55, 4)
    nearest = model.quantize(latents, use_sinkhorn=False)[1].numpy()
    codes = resolve_collisions(model, latents, nearest)
    books, points = [book.numpy() for book in model.codebooks], latents.numpy()
    expected, occupied = nearest.copy(), set(map(tuple, nearest.tolist()))
    for group in collision_groups(nearest):
        centre = sum(book[nearest[group[0], level]] for level, book in enumerate(books))
        for row in group[np.argsort(((points[group] - centre) ** 2).sum(1), kind="stable")][1:]:
            expected[row] = first_free(points[row], books, occupied)
            occupied.add(tuple(expected[row].tolist()))
    assert codes.tolist() == expected.tolist()


def test_time_of_equal_items_is_linear():
    """Four times as many items with one embedding, or one semantic ID, take about four times as long, not sixteen."""
    model = make_rqvae((64, 64, 64), epsilon=0.0)

    def seconds(items):
        begun = time.process_time()
        resolve_collisions(model, torch.zeros(items, 4), np.zeros((items, 3), dtype=np.int64))
        repaired = deduplicate({str(item): ["<a_1>", "<b_1>", "<c_1>"] for item in range(10 * items)})
        assert len({tuple(codes) for codes in repaired.values()}) == 10 * items
        return time.process_time() - begun

    assert seconds(2_000) < 9 * min(seconds(500) for _ in range(3))


def test_more_items_than_semantic_ids():
    model = make_rqvae((2, 2))
    with pytest.raises(InputError, match="5 items do not fit into 4 semantic IDs"):
        resolve_collisions(model, torch.zeros(5, 4), np.zeros((5, 2), dtype=np.int64))


def write_embeddings(toy, width=8):
    path = toy / "toy" / "toy.emb-minilm-td.npy"
    np.save(path, np.random.default_rng(0).normal(size=(9, width)).astype(np.float32))
    return path


def test_train_and_generate(toy, tmp_path, script):
    path, rqvae = write_embeddings(toy), tmp_path / "rqvae"
    flags = ("--epochs", 30, "--codebook_sizes", 3, 4, "--hidden_sizes", 16, "--code_dim", 4)
    code, out, error = script(train.main, "--embeddings", path, "--output_dir", rqvae, *flags)
    assert code == 0, error
    curve = json.loads((rqvae / "run.json").read_text())["curve"]
    assert curve[-1]["reconstruction"] < curve[0]["reconstruction"]
    (toy / "toy/toy.index.json").unlink()
    code, out, error = script(generate.main, "--dataset", "toy", "--data_path", toy, "--rqvae", rqvae)
    assert code == 0 and "0 at the end" in out and "perplexity" in out
    index = open_interactions(toy, "toy", ["items", "index"]).index
    assert len(set(map(tuple, index.values()))) == 9
    assert all(a.startswith("<a_") and b.startswith("<b_") for a, b in index.values())


def test_the_seed_determines_the_rqvae(tmp_path, script):
    """Of several threads, whose sums have one order; another number of threads can differ in the last digits."""
    path, weights = tmp_path / "items.npy", set()
    np.save(path, np.random.default_rng(0).normal(size=(1200, 64)).astype(np.float32))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for run in range(4):
            size = ("--codebook_sizes", 64, 64, "--epochs", 5, "--output_dir", tmp_path / str(run))
            assert script(train.main, "--embeddings", path, *size)[0] == 0
            weights.add((tmp_path / str(run) / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(num_threads)
    assert len(weights) == 1


def test_bad_input_of_train_and_generate(toy, tmp_path, refused, script):
    path, rqvae = write_embeddings(toy), tmp_path / "rqvae"
    assert "no such file" in refused(train.main, "--embeddings", tmp_path / "no.npy", "--output_dir", rqvae)
    source = ("--dataset", "toy", "--data_path", toy, "--rqvae", rqvae)
    assert f"{rqvae}: contains no RQ-VAE" in refused(generate.main, *source)
    out = ("--embeddings", path, "--output_dir", rqvae)
    for message, *flags in (
        ("9 items do not fit into 4 semantic IDs", "--codebook_sizes", 2, 2),
        ("a level of 1 codes; every level needs at least 2", "--codebook_sizes", 1, 9),
        ("27 levels of codes; at most 26", "--codebook_sizes", *[2] * 27),
        ("9 items, fewer than the 32 codes", "--method", "kmeans", "--codebook_sizes", 2, 32),
        ("--epochs has no effect with --method kmeans", "--method", "kmeans", "--epochs", 3),
        (
            "--hidden_sizes has no effect with --method balanced-kmeans",
            "--method",
            "balanced-kmeans",
            "--hidden_sizes",
            8,
        ),
        ("invalid choice: 'forest'", "--method", "forest"),
        ("--sinkhorn_epsilon 0 or at least 0.0015", "--sinkhorn_epsilon", "nan"),
        ("--hidden_sizes at least 1", "--hidden_sizes", 0),
        ("--seed -1", "--seed", -1),
    ):
        assert message in refused(train.main, *out, *flags)
    np.save(path, np.ones((9, 8), np.float32))
    assert "all 9 rows are equal" in refused(train.main, *out)
    assert not rqvae.exists()

    write_embeddings(toy)
    flags = ("--epochs", 1, "--codebook_sizes", 3, 3, "--hidden_sizes", 16, "--code_dim", 4)
    assert script(train.main, *out, *flags)[0] == 0
    index_bytes = (toy / "toy/toy.index.json").read_bytes()
    assert "--seed has no effect with --rqvae" in refused(generate.main, *source, "--seed", 1)
    assert "not allowed with argument" in refused(generate.main, *source, "--random")
    assert "--rqvae --random is required" in refused(generate.main, *source[:4])
    random = (*source[:4], "--random")
    assert "--embeddings has no effect with --random" in refused(generate.main, *random, "--embeddings", path)
    assert "9 items do not fit into 8" in refused(generate.main, *random, "--codebook_sizes", 2, 4)
    np.save(path, np.ones((8, 8), np.float32))
    assert "shape [8, 8]" in refused(generate.main, *source)
    np.save(path, np.ones((9, 5), np.float32))
    assert "expects embeddings of width 8, got width 5" in refused(generate.main, *source)
    assert (toy / "toy/toy.index.json").read_bytes() == index_bytes


# ---- Baseline strategies: k-means, balanced k-means, random ----


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 99), st.booleans())
def test_balanced_assignment_is_balanced_and_stable(items, codes, seed, ties):
    distances = torch.randn(items, codes, generator=torch.Generator().manual_seed(seed))
    distances = distances.round() if ties else distances
    assignment = balanced_assignment(distances)
    capacity = -(-items // codes)
    counts = torch.bincount(assignment, minlength=codes)
    assert counts.max() <= capacity
    own = distances[torch.arange(items), assignment]
    for item in range(items):
        for code in (distances[item] < own[item]).nonzero().flatten():  # nearer than the assigned code
            assert counts[code] == capacity and distances[item, code] >= own[assignment == code].max()


def test_balance_finds_centres_of_equal_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat_interleave(8, 0) + 0.1 * torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    book = points[[0, 1, 2]].clone()  # all in one cluster
    codes = balance(points, book)
    assert torch.bincount(codes).tolist() == [8, 8, 8]
    assert all(torch.allclose(book[code], points[codes == code].mean(0), atol=1e-5) for code in range(3))
    before = (
        (points - points[[0, 1, 2]][balanced_assignment(torch.cdist(points, points[[0, 1, 2]]) ** 2)]) ** 2
    ).sum()
    assert ((points - book[codes]) ** 2).sum() < before


def test_residual_k_means_clusters_the_residuals():
    coarse, fine = torch.tensor([[-9.0, 0.0], [9.0, 0.0]]), torch.tensor([[0.0, -1.0], [0.0, 0.0], [0.0, 1.0]])
    first, second = torch.arange(60) % 2, torch.arange(60) % 3
    points = coarse[first] + fine[second]
    books = [torch.zeros(2, 2), torch.zeros(3, 2)]
    fill_codebooks(points, books, seed=0)
    model = RQVAE(RQVAEConfig(2, None, codebook_sizes=(2, 3))).requires_grad_(False)
    for book, values in zip(model.codebooks, books, strict=True):
        book.copy_(values)
    assert torch.equal(model.encode(points), points) and not list(model.encoder.parameters())
    output = model(points, use_sinkhorn=False)
    assert torch.allclose(output.reconstruction, points, atol=1e-4) and output.reconstruction_loss < 1e-8
    pairs = {tuple(row) for row in torch.cat([output.codes, first[:, None], second[:, None]], 1).tolist()}
    assert len(pairs) == 6  # one code per centre on each level


def test_balanced_codes_are_balanced_on_every_level():
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) ** 3
    books = [torch.zeros(4, 6), torch.zeros(8, 6)]
    fill_codebooks(points, books, seed=0, balanced=True)
    codes = balanced_codes(points, books)
    assert np.bincount(codes[:, 0]).max() <= 13 and np.bincount(codes[:, 1]).max() <= 7


@pytest.mark.parametrize("sizes, items", [((3, 3), 9), ((5, 7), 20), ((256,) * 26, 50)])
def test_random_codes_are_distinct_and_repeatable(sizes, items):
    codes = random_codes(list(sizes), items, seed=3)
    assert codes.shape == (items, len(sizes)) and count_collisions(codes) == 0
    assert (codes >= 0).all() and (codes < np.array(sizes)).all()
    assert (codes == random_codes(list(sizes), items, seed=3)).all()
    assert (codes != random_codes(list(sizes), items, seed=4)).any()


def test_every_strategy_gives_every_item_a_semantic_id(toy, tmp_path, script):
    path = write_embeddings(toy)
    np.save(path, np.repeat(np.load(path)[:3], 3, axis=0))  # three items, each three times
    # Balanced k-means separates some of the duplicates: a code of the last levels takes at most ceil(9 / 2) items.
    for method, num_colliding in (("kmeans", 9), ("balanced-kmeans", 7)):
        flags = ("--method", method, "--embeddings", path, "--output_dir", tmp_path / method)
        code, _, error = script(train.main, *flags, "--codebook_sizes", 3, 2, 2)
        assert code == 0, error
        source = ("--dataset", "toy", "--data_path", toy, "--rqvae", tmp_path / method, "--force")
        code, out, error = script(generate.main, *source)
        assert code == 0 and f"items: {num_colliding} with" in out and "Sinkhorn" not in out, error
        index = open_interactions(toy, "toy", ["items", "index"]).index
        assert all(len(codes) == 3 for codes in index.values())
    path.unlink()
    written = []
    for seed in (1, 1, 2):
        flags = ("--random", "--seed", seed, "--codebook_sizes", 3, 3, "--force")
        assert script(generate.main, "--dataset", "toy", "--data_path", toy, *flags)[0] == 0
        written.append(open_interactions(toy, "toy", ["items", "index"]).index)
    assert written[0] == written[1] != written[2]


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


def test_interaction_vectors_use_training_interactions_only(toy, edit):
    text = np.eye(9, dtype=np.float32)
    _, before = JoinedEmbedding.fit(open_interactions(toy, "toy"), text, width=3, weight=0.5)
    edit("inter", lambda inter: {user: [*history[:-2], 0, 0] for user, history in inter.items()})
    assert np.allclose(before, JoinedEmbedding.fit(open_interactions(toy, "toy"), text, width=3, weight=0.5)[1])


def test_bad_input_of_embed(toy, edit, refused):
    source = ("--dataset", "toy", "--data_path", toy)
    assert "--collab_weight 2" in refused(embed.main, *source, "--collab_weight", 2)
    assert "no sentence encoder" in refused(embed.main, *source, "--plm", toy)
    for main, more in ((embed.main, ()), (generate.main, ("--random",))):
        assert "name two files" in refused(main, *source, *more, "--output", toy / "toy/toy.item.json")
    edit("item", lambda item: {key: {"title": "", "price": 3} for key in item})
    assert "no item has a title, description, brand or categories" in refused(embed.main, *source)
    assert not (toy / "toy/toy.emb-minilm-td.npy").exists()


# ---- index.repair: published index files with duplicates ----


@given(
    st.dictionaries(st.integers(0, 99).map(str), st.lists(st.sampled_from(["<a_1>", "<b_2>", "<c_3>"]), min_size=1))
)
def test_duplicates_get_new_codes_and_the_others_keep_theirs(index):
    repaired = deduplicate(index)
    semantic_ids = ["".join(codes) for codes in repaired.values()]
    assert list(repaired) == list(index) and len(set(semantic_ids)) == len(semantic_ids)
    first_item = {}
    for item, codes in index.items():
        if first_item.setdefault("".join(codes), item) == item:
            assert repaired[item] == codes
        else:
            assert repaired[item][:-1] == codes[:-1] and len(repaired[item]) == len(codes)


def test_the_published_index_of_instruments_is_repaired(shared, tmp_path, script, refused):
    published = shared / "data" / "Instruments" / "Instruments.index.json"
    code, out, error = script(repair.main, published, "--output", tmp_path / "Instruments.index.json")
    assert code == 0 and "25 of 9,922 items have a new last code" in out, error
    repaired = json.loads((tmp_path / "Instruments.index.json").read_text())
    published_codes = {code for codes in json.loads(published.read_text()).values() for code in codes}
    assert {code for codes in repaired.values() for code in codes} <= published_codes  # no new tokens
    open_interactions(shared / "data", "Instruments", ["index"], tmp_path / "Instruments.index.json")
    assert "no such file" in refused(repair.main, tmp_path / "none.json", "--output", tmp_path / "x.json")
    assert "name two files" in refused(repair.main, published, "--output", published)
    (tmp_path / "named.json").write_text(json.dumps({"1": ["x"], "2": ["x"]}))
    assert "has no number" in refused(repair.main, tmp_path / "named.json", "--output", tmp_path / "x.json")
