"""Reports of one run and of several: intervals with known answers, metrics, well-formed pages, bad input."""

import json
import math
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import report
import test as test_script
from reclingua.reporting import next_item, yes_no
from reclingua.reporting.bootstrap import (
    NUM_RESAMPLES,
    BootstrapMetrics,
    draw_counts,
    mean_metrics,
    paired_differences,
)
from reclingua.reporting.codebook import project_to_plane
from reclingua.reporting.details import load_run, report_folder, training_curves
from reclingua.utils.metadata import METADATA_FILE
from tests.helpers.reports import copy_run, details_file, edit_details
from tests.helpers.toys import TITLE

PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "img"}


# ---- Intervals ----


def test_interval_of_a_share_matches_the_closed_form():
    is_hit = np.r_[np.ones(300), np.zeros(700)][:, None]
    low, high = mean_metrics(["hit@1"], is_hit).intervals()[:, 0]
    margin = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - margin, abs=0.003) and high == pytest.approx(0.3 + margin, abs=0.003)


def test_intervals_have_the_nominal_coverage():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = mean_metrics(["mean"], generator.exponential(size=(80, 1))).intervals()[:, 0]
        covered += low < 1 < high
    assert 0.89 < covered / 200 < 0.99  # 0.95, slightly less for 80 users, with the noise of 200 trials


def test_paired_differences_are_significant_where_intervals_overlap_and_not_between_equals():
    generator = np.random.default_rng(1)
    users = generator.normal(0.5, 0.3, (400, 1))  # variance between users is large
    better = users + 0.02 + generator.normal(0, 0.05, (400, 1))
    equal = users + generator.normal(0, 0.05, (400, 1))
    equal += (users - equal).mean()
    a, b, c = (mean_metrics(["m"], values) for values in (users, better, equal))
    assert a.intervals()[1, 0] > b.intervals()[0, 0]  # they overlap
    ((value, low, high, is_significant),) = paired_differences(b, a)
    assert is_significant and low < value < high and value == pytest.approx(0.02, abs=0.01)
    assert paired_differences(a, a) == [(0, 0, 0, False)]
    assert not paired_differences(c, a)[0].is_significant


def test_draws_depend_neither_on_the_number_of_metrics_nor_on_the_chunk_size():
    values = np.random.default_rng(2).normal(size=(50, 3))
    one, three = mean_metrics(["a"], values[:, :1]), mean_metrics(["a", "b", "c"], values)
    chunked = BootstrapMetrics(one.names, one.statistic, one.num_users, num_samples=2_000_000)  # two draws a chunk
    np.testing.assert_allclose(one.resample()[:, 0], three.resample()[:, 0])
    np.testing.assert_allclose(one.resample(), chunked.resample())


def test_draws_are_made_once_for_all_metrics_of_a_page():
    draw_counts.cache_clear()
    values = np.random.default_rng(2).normal(size=(50, 3))
    metrics = [mean_metrics(["a"], values[:, [column]]) for column in range(3)]
    for metric in metrics:
        metric.intervals()
        paired_differences(metric, metrics[0])
    assert draw_counts.cache_info().misses == 1
    counts = draw_counts(50, NUM_RESAMPLES, 0)
    assert (counts.sum(axis=1) == 50).all() and counts.dtype == np.uint8


def test_auc_of_draws_equals_auc_of_repeated_ratings():
    generator = np.random.default_rng(3)
    users, labels = generator.integers(12, size=200), generator.integers(2, size=200)
    scores = np.round(generator.normal(size=200) + labels, 1)  # with ties
    counts = generator.integers(0, 3, size=(4, 12)).astype(float)
    for user_counts, auc in zip(counts, yes_no.auc_statistic(users, labels, scores)(counts), strict=True):
        repeats = user_counts[users].astype(int)
        assert auc == pytest.approx(roc_auc_score(np.repeat(labels, repeats), np.repeat(scores, repeats)))
    user_aucs = [roc_auc_score(labels[users == user], scores[users == user]) for user in range(12)]
    uaucs = yes_no.uauc_statistic(users, labels, scores, 12)(counts)
    np.testing.assert_allclose(uaucs, counts @ user_aucs / counts.sum(axis=1))


def test_user_bins_handle_ties_and_few_users():
    ties = np.array([1] * 50 + [2, 3, 3, 9])
    bins = next_item.bin_users(ties)
    assert sum(mask.sum() for _, mask in bins) == len(ties)
    assert [name for name, _ in bins] == ["1", "2–9"]
    assert [name for name, _ in next_item.bin_users(np.arange(1, 9))] == ["1–2", "3–4", "5–6", "7–8"]
    assert [name for name, _ in next_item.bin_users(np.array([7]))] == ["7"]


def test_calibration_and_roc_of_calibrated_probabilities():
    generator = np.random.default_rng(4)
    logits = generator.normal(size=20_000)
    labels = (generator.random(20_000) < 1 / (1 + np.exp(-logits))).astype(int)
    probabilities, liked, counts = yes_no.calibration_bins(labels, logits)
    assert counts.sum() == 20_000 and len(counts) == 10
    np.testing.assert_allclose(probabilities, liked, atol=0.04)
    curve = yes_no.roc_curve(labels, logits)
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(roc_auc_score(labels, logits), abs=1e-3)
    assert len(yes_no.calibration_bins(labels, np.zeros(20_000))[2]) == 1


def test_plane_has_the_largest_variance():
    generator = np.random.default_rng(5)
    points, share = project_to_plane(generator.normal(size=(300, 5)) * [1, 9, 0.1, 4, 0.1])
    assert share[0] == pytest.approx(81 / 98, abs=0.05) and share[1] == pytest.approx(16 / 98, abs=0.05)
    assert np.abs(points).max() == 1
    for flat in (np.ones((4, 3), np.float32), np.arange(4.0)[:, None]):
        points, share = project_to_plane(flat)
        assert points.shape == (4, 2) and np.isfinite(points).all() and len(share) == 2


def test_training_curves_of_both_log_formats(tmp_path):
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
    """Strict parser of a page: every tag has to be closed in order; keeps headings, table rows and images."""

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
        """Return the cells of the first row with that header."""
        return next(cells[1:] for cells in self.rows if cells and cells[0] == name)


def check_page(path, names):
    """Check that a page is well-formed, small and self-contained, and its plots have alt texts and PNG files."""
    page = Page(path)
    assert path.stat().st_size < 1_500_000
    assert "script" not in page.tags and "link" not in page.tags and "http" not in re.sub("http://x", "", page.text)
    assert 'name="viewport"' in page.text and "prefers-color-scheme: dark" in page.text
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 30 for image in page.images)
    for name in names:
        assert (path.parent / f"{name}.png").read_bytes().startswith(PNG)
    assert len(page.images) == len(names)
    return page


def test_next_item_page(search_run, tuned):
    names = ["hr-at-k", "by-history", "by-popularity", "training", "codes", "items"]
    page = check_page(report_folder(search_run) / "report.html", names)
    sections = ["Metrics", "HR@k against k", "History length", "Target popularity", "Prompts", "Training"]
    codes = ["Semantic IDs: codes used", "Semantic IDs: items by first code"]
    assert page.headings == ["toy: lcrec", *sections, *codes]
    results = json.loads(search_run.read_text())
    for name, metrics in {**results["baselines"], "lcrec": results["mean_results"]}.items():
        assert [cell.split()[0] for cell in page.row(name)] == [f"{value:.4f}" for value in metrics.values()]
    prompts = json.loads((tuned / METADATA_FILE).read_text())["prompts"]["seqrec_history"]
    for prompt_id, metrics in zip(results["test_prompt_ids"], results["all_prompt_results"], strict=True):
        assert page.row(f"prompt {prompt_id}") == [f"{value:.4f}" for value in metrics.values()]
        assert [f"prompt {prompt_id}", " ".join(prompts[prompt_id]["prompt"].split())] in page.rows
    for row, key in (("mean", "mean_results"), ("min", "min_results"), ("max", "max_results")):
        assert page.row(row) == [f"{value:.4f}" for value in results[key].values()]
    assert page.row("lcrec - popularity")[0].endswith("*")
    assert TITLE[:30] in page.row("<a_0>")[1] and "the model's own embeddings" in page.text.replace("&#39;", "'")
    assert f"lcrec {results['mean_results']['hit@1']:.4f} at k = 1" in page.images[0]["alt"]


def test_map_prefers_text_embeddings(searched, search_run):
    folder = search_run.parents[1] / "datasets/toy"
    np.save(folder / "toy.emb-mini-td.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    file = searched("embedded", "--sample_num", 3)
    (folder / "toy.emb-mini-td.npy").unlink()
    page = Page(report_folder(file) / "report.html")
    assert "toy.emb-mini-td.npy" in page.text and "drawn at random" not in page.text
    assert "Prompts" in page.headings and "mean" not in [cells[0] for cells in page.rows]


def test_map_states_the_number_of_sampled_items(search_run, tmp_path, script):
    file = copy_run(search_run, tmp_path)
    index = json.loads(details_file(file).read_text())["index"]
    index["map"] |= {name: index["map"][name][:5] for name in ("points", "group")}
    edit_details(file, index=index)
    code, out, _ = script(report.main, file)
    assert code == 0 and "Metrics, 95% intervals" in out and "\nlcrec  " in out and "\npopularity  " in out
    page = Page(report_folder(file) / "report.html")
    assert "The map shows 5 of 9 items, drawn at random." in page.text
    assert page.images[-1]["alt"].startswith("5 of 9 items, drawn at random")


def test_yes_no_page(preference_runs):
    names = ["warm-and-cold", "roc", "calibration", "users", "training"]
    page = check_page(report_folder(preference_runs[0]) / "report.html", names)
    sections = ["Metrics: all, warm and cold", "Baselines", "ROC curve", "Calibration", "AUC by user", "Training"]
    assert page.headings == ["liked: mf", *sections]
    results = json.loads(preference_runs[0].read_text())
    assert page.row("like-rates")[0].startswith(f"{results['baselines']['like-rates']['test']['auc']:.4f} [")
    assert len(page.row("mf - like-rates")) == 6
    for part, name in (("test", "all"), ("warm", "warm"), ("cold", "cold")):
        cells = page.row(name)
        assert [cell.split()[0] for cell in cells[:2]] == [f"{results[part][key]:.4f}" for key in ("auc", "uauc")]
        assert cells[2:] == [f"{results[part][key]:,}" for key in ("samples", "users_counted", "users_left_out")]


def test_part_without_ratings_is_shown_as_missing(preference_runs, tmp_path, script):
    file = copy_run(preference_runs[0], tmp_path)
    details = json.loads(details_file(file).read_text())
    details["warm"] = [1] * len(details["warm"])
    details_file(file).write_text(json.dumps(details))
    results = json.loads(file.read_text())
    empty = {"auc": None, "uauc": None, "users_counted": 0, "users_left_out": 0, "samples": 0}
    results["baselines"]["like-rates"] |= {"warm": results["baselines"]["like-rates"]["test"], "cold": empty}
    file.write_text(json.dumps({**results, "warm": results["test"], "cold": empty}))
    assert script(report.main, file)[0] == 0
    assert Page(report_folder(file) / "report.html").row("cold") == ["–", "–", "0", "0", "0"]
    code, out, _ = script(report.main, file, copy_run(file, tmp_path, "same.json"))
    assert code == 0 and "nan" not in out


# ---- Comparisons ----


def test_next_item_comparison(search_run, tmp_path, script):
    """A run whose ranks are all one worse loses hit@1, which is significant; a copy has no differences."""
    worse = copy_run(search_run, tmp_path, "_worse $x$.json")
    details = json.loads(details_file(worse).read_text())
    details["ranks"] = [[rank + (rank > 0) for rank in ranks] for ranks in details["ranks"]]
    details_file(worse).write_text(json.dumps(details))
    metrics = next_item.bootstrap_metrics(load_run(worse))["lcrec"]
    results = json.loads(worse.read_text())
    results["mean_results"] = dict(zip(metrics.names, metrics.values().tolist(), strict=True))
    worse.write_text(json.dumps(results))
    same = copy_run(search_run, tmp_path, "same.json")
    code, out, error = script(report.main, search_run, worse, same, "--output", tmp_path / "out/page.html")
    assert code == 0, error
    lines = defaultdict(str)  # a row wider than the screen has several lines
    for line in out.splitlines():
        lines[line.split("  ")[0]] += line
    assert max(map(len, out.splitlines()[:-1])) <= report.MAX_WIDTH
    first = json.loads(search_run.read_text())["mean_results"]["hit@1"]
    assert f"{-first:+.4f}" in lines["_worse $x$ - lcrec"] and "*" in lines["_worse $x$ - lcrec"]
    assert "*" not in lines["same - lcrec"] and "+0.0000 [+0.0000, +0.0000]" in lines["same - lcrec"]
    page = Page(tmp_path / "out/page.html")
    assert page.headings[1:] == ["Metrics", "Differences", "HR@k against k", "Different settings"]
    assert all(cell in lines["_worse $x$ - lcrec"] for cell in page.row("_worse $x$ - lcrec"))


def test_yes_no_comparison(preference_runs, script):
    code, out, error = script(report.main, *preference_runs)
    assert code == 0 and "din - mf" in out, error
    page = Page(preference_runs[0].with_name("mf.compared.html"))
    assert "ROC curve" in page.headings and "AUC all: din - mf" in page.images[0]["alt"]


def test_a_page_replaces_no_file_of_another_kind(search_run, tmp_path, script, refused):
    (tmp_path / "notes.html").write_text("mine")
    assert "exists and is no page" in refused(report.main, search_run, "--output", tmp_path / "notes.html")
    for _ in range(2):
        assert script(report.main, search_run, "--output", tmp_path / "page.html")[0] == 0


def test_bad_input(search_run, preference_runs, searched, tmp_path, refused):
    def refuse(*argv):
        return refused(report.main, *argv)

    assert "no such file" in refuse(tmp_path / "none.json")
    assert "given twice" in refuse(search_run, search_run)
    assert "compare runs of one kind" in refuse(search_run, preference_runs[0])
    assert "cannot be written" in refuse(search_run, "--output", "/proc/self/x/page.html")
    for file in (search_run, details_file(search_run)):
        assert "name two files" in refuse(search_run, "--output", file)
    fewer = searched("fewer", "--sample_num", 5)
    assert "its users differ" in refuse(search_run, fewer)
    other = copy_run(search_run, tmp_path, "other.json")
    edit_details(other, dataset="books")
    assert "is on dataset books" in refuse(search_run, other)
    edited = copy_run(search_run, tmp_path)
    whole = details_file(edited).read_text()
    for content, message in (
        (whole[: len(whole) // 2], "not valid JSON"),
        ("[1]", "contains a list"),
        ('{"kind": []}', "was not written by this version of test.py"),
        ('{"kind": "next_item"}', "was not written by this version of test.py"),
        (json.dumps(json.loads(whole) | {"prompts": ["a"]}), "prompts is not a list of 4 texts"),
        (json.dumps(json.loads(whole) | {"prompts": ["a", "b", "c", 4]}), "prompts is not a list of 4 texts"),
        (json.dumps(json.loads(whole) | {"ranks": [["a"]]}), "ranks has values of a wrong type or shape"),
        (json.dumps(json.loads(whole) | {"ranks": [[1, 2], [1]]}), "ranks has values of a wrong type or shape"),
        (json.dumps(json.loads(whole) | {"baselines": {"ease": [1]}}), "lists differ in length"),
        (json.dumps(json.loads(whole) | {"baselines": {"popularity": [1] * 60}}), "metrics differ from the details"),
        (json.dumps(json.loads(whole) | {"fused": {"ease": ["a"]}}), "fused: ease has values of a wrong type"),
        (json.dumps(json.loads(whole) | {"fused": [1]}), "fused has values of a wrong type or shape"),
    ):
        details_file(edited).write_text(content)
        assert message in refuse(edited)
    details_file(edited).unlink()
    assert "run test.py again" in refuse(edited)
    for content, message in (
        ('{"a": 1}', "has neither mean_results nor test"),
        ('{"test_prompt_ids": [0]}', "has no mean_results"),
        ("{", "not valid JSON"),
    ):
        other.write_text(content)
        assert message in refuse(other)
    broken = json.loads(search_run.read_text()) | {"mean_results": {"hit@1": "many"}}
    other.write_text(json.dumps(broken))
    assert "is not a results file of test.py" in refuse(other)


def test_broken_files_that_have_no_part_in_the_test_cost_their_picture(workshop, tuned, tmp_path, script):
    shutil.copytree(workshop / "datasets/toy", tmp_path / "toy")
    (tmp_path / "toy/toy.emb-other.npy").write_bytes(b"half of a file")
    shutil.copytree(tuned, tmp_path / "tuned", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "tuned/run.json").write_text('{"log": [')
    where = ("--ckpt_path", tmp_path / "tuned", "--data_path", tmp_path, "--results_file", tmp_path / "r.json")
    code, out, error = script(test_script.main, *where, "--num_beams", 5, "--metrics", "hit@1", "--sample_num", 3)
    assert code == 0, error
    assert out.count("the map of items leaves out") == out.count("the report has no training curves") == 1
    page = (tmp_path / "r/report.html").read_text()
    assert "own embeddings of the codes" in page and "hit@1" in page


def test_results_are_written_even_if_the_report_fails(workshop, tuned, tmp_path, refused):
    (tmp_path / "r").write_text("a file where the report's folder should be")
    where = ("--data_path", workshop / "datasets", "--results_file", tmp_path / "r.json", "--num_beams", 5)
    error = refused(test_script.main, "--ckpt_path", tuned, *where, "--metrics", "hit@1", "--sample_num", 3)
    assert "cannot be written" in error
    assert json.loads((tmp_path / "r.json").read_text())["users"] == 3
