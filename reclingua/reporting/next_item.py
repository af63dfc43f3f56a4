"""The report of a model that searches for the next item: beside the baselines, for whom it works, its index."""

import numpy as np

from reclingua.metrics import parse_metrics
from reclingua.reporting import plots
from reclingua.reporting.bootstrap import LEVEL, BootstrapMetrics, differences, means
from reclingua.reporting.curves import training
from reclingua.reporting.details import BASELINES, Run
from reclingua.reporting.html import MISSING, Section, Table, with_interval
from reclingua.reporting.plots import Line
from reclingua.reporting.prompts import templates
from reclingua.utils.errors import InputError

BINS = 4  # of users


def figures(
    run: Run, metrics: list[str] | None = None, users: np.ndarray | None = None
) -> dict[str, BootstrapMetrics]:
    """Of each baseline and, last, of the model: `metrics` (default: those of the results) as means over `users`.

    The model's figures are means over its phrasings, as `mean_results` has them.
    """
    metrics = metrics or list(run.results["mean_results"])
    users = np.ones(len(run.evidence["users"]), bool) if users is None else users
    rows = {name: run.evidence[name][None] for name in BASELINES} | {run.method: run.evidence["ranks"]}
    return {
        name: means(metrics, np.stack([_of_each(ranks[:, users], metric) for metric in metrics], axis=1))
        for name, ranks in rows.items()
    }


def _of_each(ranks: np.ndarray, metric: str) -> np.ndarray:
    """float64 [users]: a metric of places [phrasings, users], 0 = not found."""
    ((kind, k),) = parse_metrics(metric)
    found = (ranks > 0) & (ranks <= k)
    gain = found if kind == "hit" else found / np.log2(np.maximum(ranks, 1) + 1)
    return gain.mean(axis=0)


def check(run: Run) -> None:
    """InputError unless the evidence gives the figures of the results file."""
    of_run = figures(run)
    written = {**{name: run.results["baselines"][name] for name in BASELINES}, run.method: run.results["mean_results"]}
    for name, each in of_run.items():
        if not np.allclose(each.values(), [written[name][metric] for metric in each.names], atol=1e-9):
            raise InputError(f"{run.file}: its figures are not those of the evidence beside it; run test.py again")


def paired_keys(run: Run) -> dict[str, np.ndarray]:
    """What must be alike in runs that are compared: users and what they took."""
    return {"users": run.evidence["users"], "targets": run.evidence["targets"]}


def longest_hit(run: Run) -> str:
    """The metric that pictures show: hit@k of the largest k, or the last metric where there is no hit."""
    hits = [name for name in run.results["mean_results"] if name.startswith("hit")]
    return max(hits, key=lambda name: int(name[4:])) if hits else list(run.results["mean_results"])[-1]


def summary(run: Run) -> str:
    seen = "seen items excluded" if run.results["arguments"].get("exclude_seen") else "seen items allowed"
    return (
        f"{run.results.get('test_task', 'SeqRec')}, {len(run.evidence['users']):,} test users, "
        f"{run.results['num_beams']} beams, {seen}. Intervals: {LEVEL} %, bootstrap over users."
    )


def sections(run: Run) -> list[Section]:
    return [
        _metrics(run),
        _by_k(run),
        _by_users(run, "history_lengths", "Length of history", "items in the history", "by-history"),
        _by_users(run, "target_popularity", "Popularity of the target", "training interactions", "by-popularity"),
        *_phrasings(run),
        training(run),
        *_index(run),
    ]


def _metrics(run: Run) -> Section:
    of_run = figures(run)
    names = of_run[run.method].names
    rows = []
    for name, each in of_run.items():
        cells = [with_interval(*triple) for triple in zip(each.values(), *each.intervals(), strict=True)]
        rows.append([name, *cells])
    compared = []
    for name in BASELINES:
        found = differences(of_run[run.method], of_run[name])
        compared.append([f"{run.method} - {name}", *(difference(*each) for each in found)])
    return Section(
        "Metrics",
        ["A difference is real (*) if its interval does not hold 0; both were measured on the same users."],
        [Table("Metrics and their intervals", ["", *names], rows), Table("Differences", ["", *names], compared)],
    )


def difference(value: float, low: float, high: float, real: bool) -> str:
    """ "+0.0148 [+0.0021, +0.0276] *"."""
    return MISSING if value != value else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]{' *' if real else ''}"


def hits_by_k(each: BootstrapMetrics) -> Line:
    ks = [int(name[4:]) for name in each.names]
    return Line(ks, each.values(), *each.intervals())


def _by_k(run: Run) -> Section:
    names = [f"hit@{k}" for k in range(1, run.results["num_beams"] + 1)]
    of_run = {name: hits_by_k(each) for name, each in figures(run, names).items()}
    ends = "; ".join(
        f"{name} {line.y[0]:.4f} at k = 1, {line.y[-1]:.4f} at k = {len(names)}" for name, line in of_run.items()
    )
    picture = plots.lines(
        "hr-at-k", f"HR@k against k. {ends}.", of_run, "k", "HR@k", marker="." if len(names) < 2 else ""
    )
    return Section("HR@k against k", ["The share of users whose item is among the first k."], pictures=[picture])


def bins_of(values: np.ndarray, most: int = BINS) -> list[tuple[str, np.ndarray]]:
    """Users in up to `most` groups of about one size by whole numbers [users], equal ones together: (name, mask)."""
    quantiles = np.unique(np.quantile(values, np.arange(1, most) / most, method="inverted_cdf"))
    at = np.searchsorted(quantiles, values)
    groups = []
    for step_of in np.unique(at):
        mask = at == step_of
        low, high = values[mask].min(), values[mask].max()
        groups.append((f"{low:,}" if low == high else f"{low:,}–{high:,}", mask))
    return groups


def _by_users(run: Run, key: str, title: str, unit: str, name: str) -> Section:
    shown = longest_hit(run)
    rows, heights, ends = [], {}, []
    groups = bins_of(run.evidence[key])
    for said, mask in groups:
        of_bin = figures(run, users=mask)
        metrics = of_bin[run.method].names
        at = metrics.index(shown)
        values, intervals = of_bin[run.method].values(), of_bin[run.method].intervals()
        rows.append(
            [said, f"{mask.sum():,}", *(with_interval(*each) for each in zip(values, *intervals, strict=True))]
        )
        ends.append(intervals[:, at])
        for row, each in of_bin.items():
            heights.setdefault(row, []).append(each.values()[at])
    given = {
        row: (np.array(each), np.stack(ends, axis=1) if row == run.method else None) for row, each in heights.items()
    }
    told = "; ".join(
        f"{said}: " + ", ".join(f"{row} {each[at]:.4f}" for row, each in heights.items())
        for at, (said, _) in enumerate(groups)
    )
    picture = plots.bars(name, f"{shown} by {unit}. {told}.", given, [said for said, _ in groups], unit, shown)
    table = Table(f"{run.method} by {unit}", [unit, "users", *metrics], rows)
    return Section(title, tables=[table], pictures=[picture])


def _phrasings(run: Run) -> list[Section]:
    names = list(run.results["mean_results"])
    figures = [[found[name] for name in names] for found in run.results["all_prompt_results"]]
    return templates(run, names, figures, "All other figures of this page are means over these.")


def _index(run: Run) -> list[Section]:
    index = run.evidence["index"]
    levels, place, groups = index["levels"], index["map"], index["groups"]
    used = ", ".join(f"level {at}: {level['codes_used']:,}" for at, level in enumerate(levels, start=1))
    rows = [
        [str(at), f"{level['codes_used']:,}", f"{level['perplexity']:.1f}", f"{level['items'][0]:,}"]
        for at, level in enumerate(levels, start=1)
    ]
    table = Table("Codes of each level", ["level", "codes used", "perplexity", "items of the largest"], rows)
    picture = plots.codes("codes", f"Items of each code. Codes used, {used}.", [level["items"] for level in levels])
    codes = Section("Index: codes used", tables=[table], pictures=[picture])

    names = [group["code"] for group in groups]
    points, of_points = np.array(place["points"]), np.array(place["group"])
    items = sum(levels[0]["items"])
    shown = f"{len(points):,} of {items:,} items, drawn at random," if len(points) < items else f"{items:,} items"
    alt = f"{shown} on a plane, coloured by first code; the largest groups are listed in the table."
    rows = [[group["code"], f"{group['items']:,}", "; ".join(group["titles"])] for group in groups]
    share = " and ".join(f"{each:.0%}" for each in place["share"])
    text = [f"The first two principal components of {place['of']}; they have {share} of its variance."]
    if len(points) < items:
        text.append(f"The map shows {len(points):,} of {items:,} items, drawn at random.")
    table = Table("The largest first codes", ["first code", "items", "its most popular"], rows, texts=(2,))
    picture = plots.item_map("items", alt, points, of_points, names)
    return [codes, Section("Index: the items", text, [table], [picture])]
