"""The report of a run, and runs side by side: figures, intervals with known answers, safe pages, bad input."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import report
import test as test_script
from reclingua.reporting import next_item, yes_no
from reclingua.reporting.bootstrap import BootstrapMetrics, differences, means
from reclingua.reporting.codebook import plane
from reclingua.reporting.details import folder_of, open_run, training_curves
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.reports import change, copy_of
from tests.helpers.toys import TITLE

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img"}


# ---- Intervals ----


def test_the_interval_of_a_share_is_that_of_the_closed_form():
    taken = np.r_[np.ones(300), np.zeros(700)][:, None]
    low, high = means(["hit@1"], taken).intervals()[:, 0]
    spread = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - spread, abs=0.003) and high == pytest.approx(0.3 + spread, abs=0.003)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw, held = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = means(["mean"], draw.exponential(size=(80, 1))).intervals()[:, 0]
        held += low < 1 < high
    assert 0.89 < held / 200 < 0.99  # 0.95, a little less for 80 users, and the luck of 200


def test_a_paired_difference_is_found_that_intervals_of_each_hide_and_none_between_equals():
    draw = np.random.default_rng(1)
    users = draw.normal(0.5, 0.3, (400, 1))  # they differ a lot
    better = users + 0.02 + draw.normal(0, 0.05, (400, 1))
    equal = users + draw.normal(0, 0.05, (400, 1))
    equal += (users - equal).mean()
    a, b, c = (means(["m"], values) for values in (users, better, equal))
    assert a.intervals()[1, 0] > b.intervals()[0, 0]  # they overlap
    ((value, low, high, real),) = differences(b, a)
    assert real and low < value < high and value == pytest.approx(0.02, abs=0.01)
    assert differences(a, a) == [(0, 0, 0, False)]
    assert not differences(c, a)[0][3]


def test_all_runs_get_the_same_draws_however_many_figures_they_have():
    values = np.random.default_rng(2).normal(size=(50, 3))
    one, three = means(["a"], values[:, :1]), means(["a", "b", "c"], values)
    slow = BootstrapMetrics(one.names, one.statistic, one.users, samples=2_000_000)  # two draws at a time
    np.testing.assert_allclose(one.resampled()[:, 0], three.resampled()[:, 0])
    np.testing.assert_allclose(one.resampled(), slow.resampled())


def test_auc_of_draws_is_that_of_repeated_ratings():
    draw = np.random.default_rng(3)
    user, labels = draw.integers(12, size=200), draw.integers(2, size=200)
    scores = np.round(draw.normal(size=200) + labels, 1)  # with ties
    weights = draw.integers(0, 3, size=(4, 12)).astype(float)
    for weight, found in zip(weights, yes_no.auc_of_draws(user, labels, scores)(weights), strict=True):
        times = weight[user].astype(int)
        assert found == pytest.approx(roc_auc_score(np.repeat(labels, times), np.repeat(scores, times)))
    of_users = [roc_auc_score(labels[user == u], scores[user == u]) for u in range(12)]
    found = yes_no.uauc_of_draws(user, labels, scores, 12)(weights)
    np.testing.assert_allclose(found, weights @ of_users / weights.sum(axis=1))


def test_groups_of_users_cope_with_ties_and_few_users():
    ties = np.array([1] * 50 + [2, 3, 3, 9])
    groups = next_item.bins_of(ties)
    assert sum(mask.sum() for _, mask in groups) == len(ties)
    assert [name for name, _ in groups] == ["1", "2–9"]
    assert [name for name, _ in next_item.bins_of(np.arange(1, 9))] == ["1–2", "3–4", "5–6", "7–8"]
    assert [name for name, _ in next_item.bins_of(np.array([7]))] == ["7"]


def test_calibration_and_roc_of_probabilities_that_are_right():
    draw = np.random.default_rng(4)
    logits = draw.normal(size=20_000)
    labels = (draw.random(20_000) < 1 / (1 + np.exp(-logits))).astype(int)
    said, liked, count = yes_no.calibration(labels, logits)
    assert count.sum() == 20_000 and len(count) == 10
    np.testing.assert_allclose(said, liked, atol=0.04)
    curve = yes_no.roc(labels, logits)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
    assert len(yes_no.calibration(labels, np.zeros(20_000))[2]) == 1


def test_the_plane_has_the_largest_variance():
    draw = np.random.default_rng(5)
    points, share = plane(draw.normal(size=(300, 5)) * [1, 9, 0.1, 4, 0.1])
    assert share[0] == pytest.approx(81 / 98, abs=0.05) and share[1] == pytest.approx(16 / 98, abs=0.05)
    assert np.abs(points).max() == 1
    for flat in (np.ones((4, 3), np.float32), np.arange(4.0)[:, None]):
        points, share = plane(flat)
        assert points.shape == (4, 2) and np.isfinite(points).all() and len(share) == 2


def test_curves_of_both_kinds_of_logs(tmp_path):
    assert training_curves(tmp_path) is None
    log = [{"loss": 2.0, "step": 1}, {"eval_loss": 1.5, "eval_runtime": 3, "step": 2}, {"eval_auc": 0.6, "step": 2}]
    (tmp_path / "run.json").write_text(json.dumps({"log": log}))
    assert training_curves(tmp_path) == {
        "over": "step",
        "loss": [[1, 2.0]],
        "valid": {"loss": [[2, 1.5]], "auc": [[2, 0.6]]},
    }
    curve = [{"epoch": 1, "loss": 0.7, "auc": 0.6, "uauc": 0.5, "seconds": 1}]
    (tmp_path / "run.json").write_text(json.dumps({"curve": curve}))
    assert training_curves(tmp_path) == {
        "over": "epoch",
        "loss": [[1, 0.7]],
        "valid": {"auc": [[1, 0.6]], "uauc": [[1, 0.5]]},
    }


# ---- Pages ----


class Page(HTMLParser):
    """Reads a page strictly: each tag is closed where it should be; keeps headings, tables and pictures."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.open, self.headings, self.rows, self.images, self.tags = [], [], [], [], set()
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")

    def row(self, name):
        """The cells of the first row of that name."""
        return next(cells[1:] for cells in self.rows if cells and cells[0] == name)


def check_page(path, names):
    """The page is well-formed, small, and needs nothing else; its pictures have texts and lie beside it as PNG."""
    page = Page(path)
    assert path.stat().st_size < 1_500_000
    assert "script" not in page.tags and "link" not in page.tags and "http" not in re.sub("http://x", "", page.text)
    assert 'name="viewport"' in page.text and "prefers-color-scheme: dark" in page.text
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 30 for image in page.images)
    for name in names:
        assert (path.parent / f"{name}.png").read_bytes().startswith(PNG)
    assert len(page.images) == len(names)
    return page


def test_the_page_of_a_search(search_run, tuned):
    names = ["hr-at-k", "by-history", "by-popularity", "training", "codes", "items"]
    page = check_page(folder_of(search_run) / "report.html", names)
    sections = ["Metrics", "HR@k against k", "Length of history", "Popularity of the target", "Phrasings", "Training"]
    assert page.headings == ["toy: lcrec", *sections, "Index: codes used", "Index: the items"]
    results = json.loads(search_run.read_text())
    for name, figures in {**results["baselines"], "lcrec": results["mean_results"]}.items():
        assert [cell.split()[0] for cell in page.row(name)] == [f"{value:.4f}" for value in figures.values()]
    asked = json.loads((tuned / METADATA_FILE).read_text())["prompts"]["seqrec_history"]
    for at, figures in zip(results["test_prompt_ids"], results["all_prompt_results"], strict=True):
        assert page.row(f"phrasing {at}") == [f"{value:.4f}" for value in figures.values()]
        assert [f"phrasing {at}", " ".join(asked[at]["prompt"].split())] in page.rows
    for row, key in (("mean", "mean_results"), ("lowest", "min_results"), ("highest", "max_results")):
        assert page.row(row) == [f"{value:.4f}" for value in results[key].values()]
    assert page.row("lcrec - popularity")[0].endswith("*")
    assert TITLE[:30] in page.row("<a_0>")[1] and "the model's own embeddings" in page.text.replace("&#39;", "'")
    hits = Page(folder_of(search_run) / "report.html").images[0]["alt"]
    assert f"lcrec {results['mean_results']['hit@1']:.4f} at k = 1" in hits


def test_the_map_takes_text_embeddings_where_there_are_any(searched, search_run):
    folder = search_run.parents[1] / "datasets/toy"
    np.save(folder / "toy.emb-mini-td.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    file = searched("embedded", "--sample_num", 3)
    (folder / "toy.emb-mini-td.npy").unlink()
    page = Page(folder_of(file) / "report.html")
    assert "toy.emb-mini-td.npy" in page.text and "drawn at random" not in page.text
    assert "Phrasings" in page.headings and "mean" not in [cells[0] for cells in page.rows]


def test_the_map_says_of_how_many_items_it_shows_some(search_run, tmp_path, script):
    file = copy_of(search_run, tmp_path)
    index = json.loads((folder_of(file) / "evidence.json").read_text())["index"]
    index["map"] |= {name: index["map"][name][:5] for name in ("points", "group")}
    change(file, index=index)
    assert script(report.main, file)[0] == 0
    page = Page(folder_of(file) / "report.html")
    assert "The map shows 5 of 9 items, drawn at random." in page.text
    assert page.images[-1]["alt"].startswith("5 of 9 items, drawn at random")


def test_the_page_of_preferences(preference_runs):
    names = ["warm-and-cold", "roc", "calibration", "users", "training"]
    page = check_page(folder_of(preference_runs[0]) / "report.html", names)
    sections = ["Metrics: all, warm and cold", "ROC curve", "Calibration", "AUC of the users", "Training"]
    assert page.headings == ["liked: mf", *sections]
    results = json.loads(preference_runs[0].read_text())
    for part, name in (("test", "all"), ("warm", "warm"), ("cold", "cold")):
        found = results[part]
        cells = page.row(name)
        assert [cell.split()[0] for cell in cells[:2]] == [f"{found[key]:.4f}" for key in ("auc", "uauc")]
        assert cells[2:] == [f"{found[key]:,}" for key in ("samples", "users_counted", "users_left_out")]


def test_a_part_without_ratings_has_dashes(preference_runs, tmp_path, script):
    file = copy_of(preference_runs[0], tmp_path)
    evidence = json.loads((folder_of(file) / "evidence.json").read_text())
    evidence["warm"] = [1] * len(evidence["warm"])
    (folder_of(file) / "evidence.json").write_text(json.dumps(evidence))
    results = json.loads(file.read_text())
    empty = {"auc": None, "uauc": None, "users_counted": 0, "users_left_out": 0, "samples": 0}
    file.write_text(json.dumps({**results, "warm": results["test"], "cold": empty}))
    assert script(report.main, file)[0] == 0
    assert Page(folder_of(file) / "report.html").row("cold") == ["–", "–", "0", "0", "0"]
    code, out, _ = script(report.main, file, copy_of(file, tmp_path, "twin.json"))
    assert code == 0 and "nan" not in out


# ---- Runs side by side ----


def test_searches_side_by_side(search_run, tmp_path, script):
    """Against a run whose ranks are all one worse: hit@1 is gone, and that is real; a copy differs in nothing."""
    worse = copy_of(search_run, tmp_path, "_worse $x$.json")
    evidence = json.loads((folder_of(worse) / "evidence.json").read_text())
    evidence["ranks"] = [[rank + (rank > 0) for rank in ranks] for ranks in evidence["ranks"]]
    (folder_of(worse) / "evidence.json").write_text(json.dumps(evidence))
    found = next_item.figures(open_run(worse))["lcrec"]
    results = json.loads(worse.read_text())
    results["mean_results"] = dict(zip(found.names, found.values().tolist(), strict=True))
    worse.write_text(json.dumps(results))
    same = copy_of(search_run, tmp_path, "same.json")
    code, out, error = script(report.main, search_run, worse, same, "--output", tmp_path / "out/page.html")
    assert code == 0, error
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    first = json.loads(search_run.read_text())["mean_results"]["hit@1"]
    assert f"{-first:+.4f}" in lines["_worse $x$ - lcrec"] and "*" in lines["_worse $x$ - lcrec"]
    assert "*" not in lines["same - lcrec"] and "+0.0000 [+0.0000, +0.0000]" in lines["same - lcrec"]
    page = Page(tmp_path / "out/page.html")
    assert page.headings[1:] == ["Metrics", "Differences", "HR@k against k", "What was asked differently"]
    assert all(cell in lines["_worse $x$ - lcrec"] for cell in page.row("_worse $x$ - lcrec"))


def test_preferences_side_by_side(preference_runs, script):
    code, out, error = script(report.main, *preference_runs)
    assert code == 0 and "din - mf" in out, error
    page = Page(preference_runs[0].with_name("mf.compared.html"))
    assert "ROC curve" in page.headings and "AUC all: din - mf" in page.images[0]["alt"]


def test_bad_input(search_run, preference_runs, searched, tmp_path, refused):
    def refuse(*argv):
        return refused(report.main, *argv)

    assert "no such file" in refuse(tmp_path / "none.json")
    assert "given twice" in refuse(search_run, search_run)
    assert "compare alike" in refuse(search_run, preference_runs[0])
    assert "cannot be written" in refuse(search_run, "--output", "/proc/self/x/page.html")
    fewer = searched("fewer", "--sample_num", 5)
    assert "its users are not those of" in refuse(search_run, fewer)
    other = copy_of(search_run, tmp_path, "other.json")
    change(other, dataset="books")
    assert "is of dataset books" in refuse(search_run, other)
    shown = copy_of(search_run, tmp_path)
    whole = (folder_of(shown) / "evidence.json").read_text()
    for content, message in (
        (whole[: len(whole) // 2], "not valid JSON"),
        ("[1]", "holds a list"),
        ('{"kind": []}', "was not written by this version of test.py"),
        ('{"kind": "search"}', "was not written by this version of test.py"),
        (json.dumps(json.loads(whole) | {"phrasings": ["a"]}), "phrasings is not what test.py writes"),
        (json.dumps(json.loads(whole) | {"phrasings": ["a", "b", "c", 4]}), "phrasings is not what test.py writes"),
        (json.dumps(json.loads(whole) | {"ranks": [["a"]]}), "ranks is not what test.py writes"),
        (json.dumps(json.loads(whole) | {"ranks": [[1, 2], [1]]}), "ranks is not what test.py writes"),
        (json.dumps(json.loads(whole) | {"popularity": [1]}), "lists differ in length"),
        (json.dumps(json.loads(whole) | {"popularity": [1] * 60}), "figures are not those of the evidence"),
    ):
        (folder_of(shown) / "evidence.json").write_text(content)
        assert message in refuse(shown)
    (folder_of(shown) / "evidence.json").unlink()
    assert "run test.py again" in refuse(shown)
    for content, message in (
        ('{"a": 1}', "should be results of test.py"),
        ('{"test_prompt_ids": [0]}', "has no mean_results"),
        ("{", "not valid JSON"),
    ):
        other.write_text(content)
        assert message in refuse(other)
    broken = json.loads(search_run.read_text()) | {"mean_results": {"hit@1": "many"}}
    other.write_text(json.dumps(broken))
    assert "is not what test.py writes" in refuse(other)


def test_results_are_there_when_the_report_fails(workshop, tuned, tmp_path, refused):
    (tmp_path / "r").write_text("a file where the report's folder should be")
    where = ("--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json", "--num_beams", 5)
    said = refused(test_script.main, "--ckpt_path", tuned, *where, "--metrics", "hit@1", "--sample_num", 3)
    assert "cannot be written" in said
    assert json.loads((tmp_path / "r.json").read_text())["users"] == 3
