"""Report of a Yes/No or collaborative model: AUC and UAUC of warm and cold ratings, ROC, calibration, AUC by user."""

from collections.abc import Sequence

import numpy as np

from reclingua.metrics.roc import auc_of_groups
from reclingua.reporting import plots
from reclingua.reporting.baselines import baseline_tables, worth_of_model
from reclingua.reporting.bootstrap import CONFIDENCE, SIGNIFICANCE_NOTE, BootstrapMetrics, Statistic
from reclingua.reporting.curves import training_section
from reclingua.reporting.details import ROWS, Run, relation_note
from reclingua.reporting.html import Section, Table, format_interval, format_number
from reclingua.reporting.plots import Line
from reclingua.reporting.prompts import prompt_sections
from reclingua.utils.errors import InputError

PARTS = {"test": "all", "warm": "warm", "cold": "cold"}
MAX_BINS = 10  # of probabilities
MAX_CURVE_POINTS = 400
ROC_AXES = ("false positive rate", "true positive rate", "chance")


def part_masks(run: Run) -> dict[str, np.ndarray]:
    """Return masks [ratings] of all, warm (user and item are known from training) and cold ratings."""
    warm = run.details["warm"] == 1
    return {"test": np.ones(len(warm), bool), "warm": warm, "cold": ~warm}


def bootstrap_metrics(run: Run) -> dict[str, BootstrapMetrics]:
    """Return AUC and UAUC of all, warm and cold ratings of each baseline, the model, and each fusion of it.

    A part without ratings has NaN.
    """
    baselines, fused = (run.details[part] for part in ROWS)
    all_scores = baselines | {run.method: run.details["scores"]} | fused
    return {name: _bootstrap_metrics(run, scores) for name, scores in all_scores.items()}


def _bootstrap_metrics(run: Run, scores: np.ndarray) -> BootstrapMetrics:
    labels = run.details["labels"]
    user_ids, users = np.unique(run.details["users"], return_inverse=True)
    statistics: list[Statistic] = []
    for mask in part_masks(run).values():
        if mask.any():
            statistics.append(auc_statistic(users[mask], labels[mask], scores[mask]))
            statistics.append(uauc_statistic(users[mask], labels[mask], scores[mask], len(user_ids)))
        else:
            statistics += [_undefined] * 2

    def statistic(counts: np.ndarray) -> np.ndarray:
        return np.stack([metric(counts) for metric in statistics], axis=1)

    names = [f"{metric} {part}" for part in PARTS.values() for metric in ("AUC", "UAUC")]
    return BootstrapMetrics(names, statistic, len(user_ids), len(users))


def _undefined(counts: np.ndarray) -> np.ndarray:
    return np.full(len(counts), np.nan)


def auc_statistic(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Return counts [draws, users] -> AUC [draws], where a rating weighs as much as its user's count.

    `users` [ratings] are positions in the counts. Ties count half.
    """
    # All draws share one sort. Ratings of equal scores form a run; a positive of a run wins against the negatives of
    # all runs before it and half of those in its own.
    order = np.argsort(scores, kind="stable")
    users, is_positive, scores = users[order], labels[order] == 1, scores[order]
    run_starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])

    def statistic(counts: np.ndarray) -> np.ndarray:
        weights = counts[:, users]
        positives = np.add.reduceat(weights * is_positive, run_starts, axis=1)
        negatives = np.add.reduceat(weights * ~is_positive, run_starts, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))

    return statistic


def uauc_statistic(users: np.ndarray, labels: np.ndarray, scores: np.ndarray, num_users: int) -> Statistic:
    """Return counts [draws, users] -> UAUC [draws], the mean AUC of the drawn users whose labels are not all equal."""
    user_aucs = np.full(num_users, np.nan)
    rows, aucs = auc_of_groups(users, labels, scores)
    user_aucs[rows] = aucs
    counted = np.flatnonzero(~np.isnan(user_aucs))

    def statistic(counts: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return counts[:, counted] @ user_aucs[counted] / counts[:, counted].sum(axis=1)

    return statistic


def check_results(run: Run) -> None:
    """Raise InputError unless the details reproduce the metrics of the results file."""
    results = {run.method: run.results} | {
        name: run.results[part][name] for part in ROWS for name in run.details[part]
    }
    for name, metrics in bootstrap_metrics(run).items():
        expected = [results[name][part][metric] for part in PARTS for metric in ("auc", "uauc")]
        if not np.allclose(metrics.values(), np.array(expected, float), atol=1e-6, equal_nan=True):
            raise InputError(f"{run.file}: its metrics differ from the details beside it; run test.py again")


def paired_keys(run: Run) -> dict[str, np.ndarray]:
    """Return what has to be equal in runs that are compared: the ratings and their labels."""
    return {name: run.details[name] for name in ("users", "items", "labels", "warm")}


def summarize(run: Run) -> str:
    """Return the line below the title of the page."""
    users, labels = run.details["users"], run.details["labels"]
    return (
        f"{len(users):,} test ratings of {len(np.unique(users)):,} users, {labels.mean():.1%} liked. "
        f"{CONFIDENCE}% intervals, bootstrap over users.{relation_note(run, 'ratings')}"
    )


def build_sections(run: Run) -> list[Section]:
    """Return the sections of the page in their order."""
    return [
        _metrics_section(run),
        *_baselines_sections(run),
        *_prompt_sections(run),
        _roc_section(run),
        _calibration_section(run),
        _users_section(run),
        training_section(run),
    ]


def _metrics_section(run: Run) -> Section:
    metrics = bootstrap_metrics(run)[run.method]
    values, (low, high) = metrics.values(), metrics.intervals()
    rows = []
    for position, (part, label) in enumerate(PARTS.items()):
        results = run.results[part]
        columns = ((2 * position, "auc"), (2 * position + 1, "uauc"))
        cells = [format_interval(results[metric], low[column], high[column]) for column, metric in columns]
        counts = [f"{results[key]:,}" for key in ("samples", "users_counted", "users_left_out")]
        rows.append([label, *cells, *counts])
    text = [
        "UAUC is the mean AUC over users; users whose ratings are all liked or all disliked have no AUC and are "
        "left out.",
        "A rating is warm if its user and its item occur in the training data, otherwise cold.",
    ]
    bars = {
        metric: (np.nan_to_num(values[start::2]), np.nan_to_num(np.stack([low[start::2], high[start::2]])))
        for start, metric in enumerate(("AUC", "UAUC"))
    }
    alt = "; ".join(f"{name} {format_number(value)}" for name, value in zip(metrics.names, values, strict=True))
    plot = plots.bars("warm-and-cold", f"{alt}.", bars, list(PARTS.values()), "test ratings", "AUC, UAUC")
    header = ["", "AUC", "UAUC", "ratings", "users counted", "users left out"]
    table = Table(f"Metrics, {CONFIDENCE}% intervals", header, rows)
    return Section("Metrics: all, warm and cold", text, [table], [plot])


def _baselines_sections(run: Run) -> list[Section]:
    """Return the section that compares the model with the baselines and its fusions, [] where there are none."""
    if not run.details["baselines"]:
        return []
    metrics, text = bootstrap_metrics(run), f"All rows are measured on the same ratings. {SIGNIFICANCE_NOTE}"
    return [Section("Baselines", [*worth_of_model(run, metrics, "AUC all"), text], baseline_tables(run, metrics))]


def _prompt_sections(run: Run) -> list[Section]:
    keys = [(part, metric) for part in PARTS for metric in ("auc", "uauc")]
    metrics: Sequence[Sequence[float | None]] = [
        [results[part][metric] for part, metric in keys] for results in run.results.get("all_prompt_results", [])
    ]
    columns = [f"{metric.upper()} {PARTS[part]}" for part, metric in keys]
    return prompt_sections(run, columns, metrics, "All other metrics on this page are those of the first prompt.")


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> Line:
    """Return the true positive rate over the false positive rate, at most MAX_CURVE_POINTS of their points."""
    order = np.argsort(-scores, kind="stable")
    is_positive, scores = labels[order] == 1, scores[order]
    thresholds = np.r_[np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1]
    y, x = np.cumsum(is_positive)[thresholds], np.cumsum(~is_positive)[thresholds]
    x, y = np.r_[0, x / max(1, x[-1])], np.r_[0, y / max(1, y[-1])]
    shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_CURVE_POINTS)).round().astype(int))
    return Line(x[shown], y[shown])


def _roc_section(run: Run) -> Section:
    lines = {}
    for part, mask in part_masks(run).items():
        if run.results[part]["auc"] is not None:
            name = f"{PARTS[part]}: AUC {run.results[part]['auc']:.4f}"
            lines[name] = roc_curve(run.details["labels"][mask], run.details["scores"][mask])
    if not lines:
        return Section("ROC curve", ["All labels are equal, so there is no curve."])
    plot = plots.lines("roc", f"ROC curves. {'; '.join(lines)}.", lines, *ROC_AXES)
    return Section("ROC curve", plots=[plot])


def calibration_bins(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group ratings by predicted probability into up to MAX_BINS bins of similar size.

    `scores` are log-odds; ratings with equal scores share a bin.

    Returns:
        (mean probability, share of liked ratings, number of ratings), each [bins].
    """
    probabilities = 1 / (1 + np.exp(-np.clip(scores, -60, 60)))
    edges = np.unique(np.quantile(probabilities, np.arange(1, MAX_BINS) / MAX_BINS, method="inverted_cdf"))
    bins = np.unique(np.searchsorted(edges, probabilities), return_inverse=True)[1]
    counts = np.bincount(bins)
    return np.bincount(bins, weights=probabilities) / counts, np.bincount(bins, weights=labels) / counts, counts


def _calibration_section(run: Run) -> Section:
    probabilities, liked, counts = calibration_bins(run.details["labels"], run.details["scores"])
    error = float((np.abs(probabilities - liked) * counts).sum() / counts.sum())
    rows = [
        [f"{probability:.4f}", f"{share:.4f}", f"{count:,}"]
        for probability, share, count in zip(probabilities, liked, counts, strict=True)
    ]
    plot = plots.lines(
        "calibration",
        f"Share of liked ratings over predicted probability; expected calibration error {error:.4f}. "
        "The table contains the points.",
        {run.method: Line(probabilities, liked)},
        "predicted probability",
        "share liked",
        "calibrated",
        marker="o",
    )
    text = [f"Expected calibration error: {error:.4f}, the mean distance of predicted probability and share liked."]
    table = Table("Ratings by predicted probability", ["mean probability", "share liked", "ratings"], rows)
    return Section("Calibration", text, [table], [plot])


def _users_section(run: Run) -> Section:
    aucs = auc_of_groups(run.details["users"], run.details["labels"], run.details["scores"])[1]
    counted = aucs[~np.isnan(aucs)]
    if not len(counted):
        return Section("AUC by user", ["No user has both liked and disliked ratings, so there is no AUC by user."])
    quartiles = np.quantile(counted, (0.25, 0.5, 0.75))
    text = [
        f"{(counted < 0.5).mean():.0%} of {len(counted):,} users have an AUC below 0.5 (chance); quartiles "
        f"{', '.join(map(format_number, quartiles))}."
    ]
    plot = plots.histogram("users", f"AUC by user. {text[0]}", counted, counted.mean(), "AUC of a user", "users")
    return Section("AUC by user", text, plots=[plot])
