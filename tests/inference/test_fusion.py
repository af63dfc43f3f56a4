"""A model fused with baselines: stored beside the checkpoint, the same again, and bad input."""

import json
import shutil
from unittest import mock

import numpy as np
import pytest

import test as test_script
from reclingua import Recommender, Scorer
from reclingua.baselines import fit_baselines
from reclingua.inference.collaborative import auc_metrics
from reclingua.inference.fusion import FUSION_FILE, FusedRecommender, checkpoint_sha256, load_fusion
from reclingua.inference.rating_fusion import RatingFusion, load_rating_fusion
from reclingua.utils.errors import InputError


@pytest.fixture
def copy(tuned, tmp_path):
    """A copy of the tuned model, which can get a fusion of its own."""
    return shutil.copytree(tuned, tmp_path / "copy")


def flags(workshop, ckpt, results, *more):
    where = ("--ckpt_path", ckpt, "--data_path", workshop / "datasets", "--results_file", results)
    return *where, "--num_beams", 5, "--metrics", "hit@1,ndcg@5", "--exclude_seen", *more


def test_fusion_is_fitted_stored_and_used_again(script, workshop, copy, tmp_path):
    run = flags(workshop, copy, tmp_path / "r.json", "--fuse", "ease")
    code, out, error = script(test_script.main, *run)
    assert code == 0 and "chosen on 60 users of valid, stored in fusion.json" in out, error
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["fused"]["lcrec + ease"]["hit@1"] > 0.9
    assert {"ease", "co-occurrence", "co-occurrence + ease"} < set(results["baselines"])
    stored = json.loads((copy / FUSION_FILE).read_text())
    assert stored["fusions"] == [results["fusions"]["lcrec + ease"]]
    page = (tmp_path / "r/report.html").read_text()
    assert "What lcrec adds to the baselines" in page and "without it (co-occurrence + ease)" in page

    with mock.patch.object(FusedRecommender, "fit", side_effect=AssertionError("fitted again")):
        code, _, error = script(test_script.main, *run)
    assert code == 0, error
    again = json.loads((tmp_path / "r.json").read_text())
    assert again["fused"] == results["fused"] and again["fusions"] == results["fusions"]
    assert script(test_script.main, *run[:-1], "popularity,ease")[0] == 0
    assert len(json.loads((copy / FUSION_FILE).read_text())["fusions"]) == 2

    recommender = Recommender.from_pretrained(copy, workshop / "datasets")
    fused = load_fusion(copy, recommender)
    assert fused.name == "lcrec + popularity + ease"
    (ranked,) = fused.recommend([["1", "2"]], k=9, exclude_seen=True)
    assert ranked[0].item == "3" and len(ranked) == 7 and not {"1", "2"} & {scored.item for scored in ranked}


def test_candidates_are_the_union_with_exact_scores(workshop, tuned):
    recommender = Recommender.from_pretrained(tuned, workshop / "datasets")
    baselines = fit_baselines(recommender.dataset, True)
    fused = FusedRecommender.fit(recommender, baselines, ["ease"], excludes_seen=True, num_beams=2)
    histories = [["1", "2"], ["5", "6", "7"]]
    candidates = fused.build_candidates(recommender.encode_histories(histories), histories)
    items = baselines.catalogue.items
    for row, history in enumerate(histories):
        numbers = [number for number in candidates.numbers[row] if number >= 0]
        assert {items[number] for number in numbers} == set(items) - set(history)  # EASE's best are all
        (expected,) = recommender.score([history], [[items[number] for number in numbers]])
        np.testing.assert_allclose(candidates.scores[0, row, : len(numbers)], expected, atol=1e-4)
        scores = baselines.scores("ease", history)
        ease = [scores[items[number]] for number in numbers]
        np.testing.assert_allclose(candidates.scores[1, row, : len(numbers)], ease, rtol=1e-5)


def test_bad_input(workshop, copy, tmp_path, refused):
    def refuse(*more):
        return refused(test_script.main, *flags(workshop, copy, tmp_path / "r.json", *more))

    assert "--fuse slim: should be of popularity" in refuse("--fuse", "slim")
    assert "sasrec needs --cf_model" in refuse("--fuse", "sasrec")
    assert "names a baseline twice" in refuse("--fuse", "ease,ease")
    assert "needs --test_task SeqRec" in refuse("--fuse", "ease", "--test_task", "FusionSeqRec")
    recommender = Recommender.from_pretrained(copy, workshop / "datasets")
    good = {
        "checkpoint_sha256": "x", "data_sha256": recommender.dataset.sha256("histories"), "fusions": [{}],
    }  # fmt: skip
    for change, message in (
        ({}, "was fitted to another checkpoint"),
        ({"checkpoint_sha256": checkpoint_sha256(copy), "data_sha256": "y"}, "were fitted to other data"),
        ({"checkpoint_sha256": checkpoint_sha256(copy)}, "holds a fusion of another version"),
        ({"fusions": 3}, "has no list of fusions"),
    ):
        (copy / FUSION_FILE).write_text(json.dumps(good | change))
        assert message in refuse("--fuse", "ease")
        with pytest.raises(InputError, match=message):
            load_fusion(copy, recommender)
    (copy / FUSION_FILE).unlink()
    assert not (tmp_path / "r.json").exists()


def test_a_fusion_with_other_settings_of_the_baseline(script, workshop, copy, tmp_path, refused):
    run = flags(workshop, copy, tmp_path / "r.json", "--fuse", "ease")
    assert script(test_script.main, *run)[0] == 0
    content = json.loads((copy / FUSION_FILE).read_text())
    content["fusions"][0]["baselines"]["ease"]["l2"] = 7
    (copy / FUSION_FILE).write_text(json.dumps(content))
    assert "was fitted to another ease (other settings)" in refused(test_script.main, *run)


def test_log_odds_of_ratings_are_fused_by_logistic_regression():
    draw = np.random.default_rng(0)
    truth, noise = draw.normal(size=4000), draw.normal(size=4000)
    labels = draw.random(4000) < 1 / (1 + np.exp(-(2 * truth + 0.5)))
    fusion = RatingFusion.fit({"good": truth, "noise": noise, "constant": np.ones(4000)}, labels)
    assert fusion.weights["good"] == pytest.approx(2, abs=0.2) and abs(fusion.weights["noise"]) < 0.1
    total = 2 * fusion.weights["good"] + fusion.weights["constant"] + fusion.intercept
    sources = {"good": np.array([2.0]), "noise": np.zeros(1), "constant": np.ones(1)}
    assert fusion.log_odds(sources)[0] == pytest.approx(total)
    with pytest.raises(InputError, match="all liked or all disliked"):
        RatingFusion.fit({"good": truth}, np.ones(4000))


def test_a_model_of_ratings_is_fused_with_like_rates(script, studio, tmp_path, refused):
    copied = shutil.copytree(studio / "mf", tmp_path / "mf")
    run = ("--ckpt_path", copied, "--data_path", studio, "--results_file", tmp_path / "r.json")
    code, _, error = script(test_script.main, *run, "--fuse", "like-rates")
    assert code == 0, error
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["fused"]) == {"mf + like-rates"} and set(results["baselines"]) == {"like-rates"}
    weights = json.loads((copied / FUSION_FILE).read_text())["fusions"][0]["weights"]
    assert list(weights) == ["mf", "item like-rate", "user like-rate"] and weights["mf"] > 0
    assert results["fused"]["mf + like-rates"]["test"]["auc"] > 0.8
    assert "What mf adds to the baselines" in (tmp_path / "r/report.html").read_text()
    assert "a model of ratings is fused with like-rates" in refused(test_script.main, *run, "--fuse", "ease")

    scorer = Scorer.from_pretrained(copied, studio)
    fused, part = load_rating_fusion(copied, scorer), scorer.dataset.parts["test"]
    log_odds = fused.log_odds(part)
    assert auc_metrics(part, log_odds)["test"] == pytest.approx(results["fused"]["mf + like-rates"]["test"])
    stored = json.loads((copied / FUSION_FILE).read_text())
    stored["fusions"][0]["weights"]["din"] = 1.0
    (copied / FUSION_FILE).write_text(json.dumps(stored))
    with pytest.raises(InputError, match="holds no fusion of mf with like-rates"):
        load_rating_fusion(copied, scorer)
