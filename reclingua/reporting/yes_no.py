"""The report of a model that says whether users like items: ROC curve, calibration, warm and cold, the users' AUCs."""

import numpy as np

from reclingua.metrics.roc import auc_of_groups
from reclingua.reporting import plots
from reclingua.reporting.bootstrap import LEVEL, BootstrapMetrics, Statistic
from reclingua.reporting.curves import training
from reclingua.reporting.details import Run
from reclingua.reporting.html import Section, Table, number, with_interval
from reclingua.reporting.plots import Line
from reclingua.reporting.prompts import templates
from reclingua.utils.errors import InputError

PARTS = {"test": "all", "warm": "warm", "cold": "cold"}
BINS = 10  # of probabilities
CURVE_POINTS = 400


def parts_of(run: Run) -> dict[str, np.ndarray]:
    """Masks [ratings]: all, warm (training knew user and item), cold."""
    warm = run.evidence["warm"] == 1
    return {"test": np.ones(len(warm), bool), "warm": warm, "cold": ~warm}


def figures(run: Run) -> dict[str, BootstrapMetrics]:
    """AUC and UAUC of all, warm and cold ratings, by the model's name."""
    evidence = run.evidence
    names, user = np.unique(evidence["users"], return_inverse=True)
    parts = {part: rows for part, rows in parts_of(run).items() if rows.any()}
    of_parts = {
        part: [
            auc_of_draws(user[rows], evidence["labels"][rows], evidence["scores"][rows]),
            uauc_of_draws(user[rows], evidence["labels"][rows], evidence["scores"][rows], len(names)),
        ]
        for part, rows in parts.items()
    }

    def statistic(weights: np.ndarray) -> np.ndarray:
        missing = np.full(len(weights), np.nan)
        columns = [of(weights) for part in PARTS for of in of_parts.get(part, [lambda _: missing] * 2)]
        return np.stack(columns, axis=1)

    said = [f"{kind} {part}" for part in PARTS.values() for kind in ("AUC", "UAUC")]
    return {run.method: BootstrapMetrics(said, statistic, len(names), len(user))}


def auc_of_draws(user: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """The AUC of all ratings, each as often as its user, a number from 0, was drawn; ties count half."""
    order = np.argsort(scores, kind="stable")
    user, positive, scores = user[order], labels[order] == 1, scores[order]
    runs = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])

    def of(weights: np.ndarray) -> np.ndarray:
        weight = weights[:, user]
        liked = np.add.reduceat(weight * positive, runs, axis=1)
        others = np.add.reduceat(weight * ~positive, runs, axis=1)
        below = np.cumsum(others, axis=1) - others / 2
        with np.errstate(invalid="ignore", divide="ignore"):
            return (liked * below).sum(axis=1) / (liked.sum(axis=1) * others.sum(axis=1))

    return of


def uauc_of_draws(user: np.ndarray, labels: np.ndarray, scores: np.ndarray, users: int) -> Statistic:
    """The mean AUC of the users drawn, each as often as it was; users with labels of one kind don't count."""
    of_users = np.full(users, np.nan)
    numbers, found = auc_of_groups(user, labels, scores)
    of_users[numbers] = found
    counted = np.flatnonzero(~np.isnan(of_users))

    def of(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return weights[:, counted] @ of_users[counted] / weights[:, counted].sum(axis=1)

    return of


def check(run: Run) -> None:
    """InputError unless the evidence gives the figures of the results file."""
    found = figures(run)[run.method].values()
    written = [run.results[part][key] for part in PARTS for key in ("auc", "uauc")]
    if not np.allclose(found, np.array(written, float), atol=1e-6, equal_nan=True):
        raise InputError(f"{run.file}: its figures are not those of the evidence beside it; run test.py again")


def paired_keys(run: Run) -> dict[str, np.ndarray]:
    """What must be alike in runs that are compared: ratings and what they say."""
    return {name: run.evidence[name] for name in ("users", "items", "labels", "warm")}


def summary(run: Run) -> str:
    users = len(np.unique(run.evidence["users"]))
    return (
        f"{len(run.evidence['users']):,} test ratings of {users:,} users, {run.evidence['labels'].mean():.1%} liked. "
        f"Intervals: {LEVEL} %, bootstrap over users."
    )


def sections(run: Run) -> list[Section]:
    return [
        _metrics(run),
        *_phrasings(run),
        _roc(run),
        _calibration(run),
        _users(run),
        training(run),
    ]


def _metrics(run: Run) -> Section:
    of_run = figures(run)[run.method]
    values, (low, high) = of_run.values(), of_run.intervals()
    rows = []
    for at, (part, said) in enumerate(PARTS.items()):
        of_part = run.results[part]
        cells = [with_interval(of_part[key], low[i], high[i]) for i, key in ((2 * at, "auc"), (2 * at + 1, "uauc"))]
        counts = [f"{of_part[key]:,}" for key in ("samples", "users_counted", "users_left_out")]
        rows.append([said, *cells, *counts])
    columns = ["", "AUC", "UAUC", "ratings", "users counted", "users left out"]
    text = [
        "UAUC is the mean AUC of a user; users whose ratings are all of one kind have none and are left out.",
        "Warm are ratings whose user and item are both known from training; the others are cold.",
    ]
    given = {
        kind: (np.nan_to_num(values[at::2]), np.nan_to_num(np.stack([low[at::2], high[at::2]])))
        for at, kind in enumerate(("AUC", "UAUC"))
    }
    alt = "; ".join(f"{name} {number(value)}" for name, value in zip(of_run.names, values, strict=True))
    picture = plots.bars("warm-and-cold", f"{alt}.", given, list(PARTS.values()), "test ratings", "AUC, UAUC")
    return Section(
        "Metrics: all, warm and cold", text, [Table("Metrics and their intervals", columns, rows)], [picture]
    )


def _phrasings(run: Run) -> list[Section]:
    keys = [(part, kind) for part in PARTS for kind in ("auc", "uauc")]
    figures = [[found[part][kind] for part, kind in keys] for found in run.results.get("all_prompt_results", [])]
    columns = [f"{kind.upper()} {PARTS[part]}" for part, kind in keys]
    return templates(run, columns, figures, "All other figures of this page are those of the first.")


def roc(labels: np.ndarray, scores: np.ndarray) -> Line:
    """Shares of what was not liked (x) and liked (y) among the ratings above each score, thinned out."""
    order = np.argsort(-scores, kind="stable")
    positive, scores = labels[order] == 1, scores[order]
    ends = np.r_[np.flatnonzero(scores[1:] != scores[:-1]), len(scores) - 1]
    y, x = np.cumsum(positive)[ends], np.cumsum(~positive)[ends]
    x, y = np.r_[0, x / max(1, x[-1])], np.r_[0, y / max(1, y[-1])]
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), CURVE_POINTS)).round().astype(int))
    return Line(x[kept], y[kept])


def _roc(run: Run) -> Section:
    given = {}
    for part, rows in parts_of(run).items():
        if run.results[part]["auc"] is not None:
            name = f"{PARTS[part]}: AUC {run.results[part]['auc']:.4f}"
            given[name] = roc(run.evidence["labels"][rows], run.evidence["scores"][rows])
    if not given:
        return Section("ROC curve", ["All labels are of one kind, so there is no curve."])
    picture = plots.lines(
        "roc",
        f"ROC curves. {'; '.join(given)}.",
        given,
        "share of what was not liked",
        "share of what was liked",
        "chance",
    )
    return Section("ROC curve", pictures=[picture])


def calibration(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean probability, share liked, ratings) of up to BINS groups of about one size, by probability.

    Scores are log-odds; ratings of one score stay together.
    """
    probability = 1 / (1 + np.exp(-np.clip(scores, -60, 60)))
    edges = np.unique(np.quantile(probability, np.arange(1, BINS) / BINS, method="inverted_cdf"))
    at = np.unique(np.searchsorted(edges, probability), return_inverse=True)[1]
    count = np.bincount(at)
    return np.bincount(at, weights=probability) / count, np.bincount(at, weights=labels) / count, count


def _calibration(run: Run) -> Section:
    said, liked, count = calibration(run.evidence["labels"], run.evidence["scores"])
    error = float((np.abs(said - liked) * count).sum() / count.sum())
    rows = [[f"{p:.4f}", f"{share:.4f}", f"{n:,}"] for p, share, n in zip(said, liked, count, strict=True)]
    alt = f"Share liked against probability; on average they are {error:.4f} apart. The table has the points."
    picture = plots.lines(
        "calibration",
        alt,
        {run.method: Line(said, liked)},
        "probability of Yes",
        "share liked",
        "calibrated",
        marker="o",
    )
    text = [f"Probability and share liked are {error:.4f} apart on average (expected calibration error)."]
    table = Table("Ratings by probability", ["mean probability", "share liked", "ratings"], rows)
    return Section("Calibration", text, [table], [picture])


def _users(run: Run) -> Section:
    each = auc_of_groups(run.evidence["users"], run.evidence["labels"], run.evidence["scores"])[1]
    counted = each[~np.isnan(each)]
    if not len(counted):
        return Section("AUC of the users", ["No user has ratings of both kinds."])
    quarters = np.quantile(counted, (0.25, 0.5, 0.75))
    below = f"{(counted < 0.5).mean():.0%} of {len(counted):,} users are below 0.5, no better than chance"
    text = [f"{below}; quartiles {', '.join(map(number, quarters))}."]
    picture = plots.histogram(
        "users", f"AUC of each user. {text[0]}", counted, counted.mean(), "AUC of a user", "users"
    )
    return Section("AUC of the users", text, pictures=[picture])
