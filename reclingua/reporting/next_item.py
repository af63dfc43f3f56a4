"""Report of a next-item model: metrics beside the baselines, metrics by user group, semantic IDs."""

from collections.abc import Sequence

import numpy as np

from reclingua.metrics import rank_gains
from reclingua.reporting import plots
from reclingua.reporting.baselines import baseline_tables, worth_of_model
from reclingua.reporting.bootstrap import CONFIDENCE, SIGNIFICANCE_NOTE, BootstrapMetrics, mean_metrics
from reclingua.reporting.curves import training_section
from reclingua.reporting.details import ROWS, Run, relation_note
from reclingua.reporting.html import Section, Table, format_interval
from reclingua.reporting.plots import Line
from reclingua.reporting.prompts import prompt_sections
from reclingua.utils.errors import InputError

MAX_BINS = 4  # groups of users


def bootstrap_metrics(
    run: Run, names: list[str] | None = None, mask: np.ndarray | None = None
) -> dict[str, BootstrapMetrics]:
    """Return the metrics `names` (default: those of the results) of each baseline, the model, and each fusion of it.

    Each is a mean over users, or over those in `mask`. The model's metrics are means over its prompts, like
    `mean_results`.
    """
    names = names or list(run.results["mean_results"])
    mask = np.ones(len(run.details["users"]), bool) if mask is None else mask
    baselines, fused = ({name: ranks[None] for name, ranks in run.details[part].items()} for part in ROWS)
    all_ranks = baselines | {run.method: run.details["ranks"]} | fused
    return {
        label: mean_metrics(names, np.stack([rank_gains(ranks[:, mask], name).mean(axis=0) for name in names], axis=1))
        for label, ranks in all_ranks.items()
    }


def check_results(run: Run) -> None:
    """Raise InputError unless the details reproduce the metrics of the results file."""
    expected = {run.method: run.results["mean_results"]}
    for part in ROWS:
        expected |= {name: run.results[part][name] for name in run.details[part]}
    for label, metrics in bootstrap_metrics(run).items():
        if not np.allclose(metrics.values(), [expected[label][name] for name in metrics.names], atol=1e-9):
            raise InputError(f"{run.file}: its metrics differ from the details beside it; run test.py again")


def paired_keys(run: Run) -> dict[str, np.ndarray]:
    """Return what has to be equal in runs that are compared: the users and their targets."""
    return {"users": run.details["users"], "targets": run.details["targets"]}


def headline_metric(run: Run) -> str:
    """Return the metric that plots show: hit@k of the largest k, or the last metric if no hit rate was measured."""
    hits = [name for name in run.results["mean_results"] if name.startswith("hit")]
    return max(hits, key=lambda name: int(name[4:])) if hits else list(run.results["mean_results"])[-1]


def summarize(run: Run) -> str:
    """Return the line below the title of the page."""
    seen = "seen items excluded" if run.results["arguments"].get("exclude_seen") else "seen items allowed"
    return (
        f"{run.results.get('test_task', 'SeqRec')}, {len(run.details['users']):,} test users, "
        f"{run.results['num_beams']} beams, {seen}. {CONFIDENCE}% intervals, bootstrap over users."
        f"{relation_note(run, 'histories')}"
    )


def build_sections(run: Run) -> list[Section]:
    """Return the sections of the page in their order."""
    return [
        _metrics_section(run),
        _hit_section(run),
        _group_section(run, "history_lengths", "History length", "items in the history", "by-history"),
        _group_section(run, "target_popularity", "Target popularity", "training interactions", "by-popularity"),
        *_prompt_sections(run),
        training_section(run),
        _codes_section(run),
        _map_section(run),
    ]


def _metrics_section(run: Run) -> Section:
    metrics, text = bootstrap_metrics(run), f"All rows are measured on the same users. {SIGNIFICANCE_NOTE}"
    worth = worth_of_model(run, metrics, metrics[run.method].names[-1])
    return Section("Metrics", [*worth, text], baseline_tables(run, metrics))


def hit_curve(metrics: BootstrapMetrics) -> Line:
    """Return the line of hit rates over k, with intervals; `metrics` are hit@k."""
    ks = [int(name[4:]) for name in metrics.names]
    return Line(ks, metrics.values(), *metrics.intervals())


def _hit_section(run: Run) -> Section:
    names = [f"hit@{k}" for k in range(1, run.results["num_beams"] + 1)]
    lines = {label: hit_curve(metrics) for label, metrics in bootstrap_metrics(run, names).items()}
    ends = "; ".join(
        f"{label} {line.y[0]:.4f} at k = 1, {line.y[-1]:.4f} at k = {len(names)}" for label, line in lines.items()
    )
    marker = "." if len(names) < 2 else ""
    plot = plots.lines("hr-at-k", f"HR@k against k. {ends}.", lines, "k", "HR@k", marker=marker)
    return Section("HR@k against k", ["HR@k is the share of users whose target is in the top k."], plots=[plot])


def bin_users(values: np.ndarray, max_bins: int = MAX_BINS) -> list[tuple[str, np.ndarray]]:
    """Split users by integers [users] into up to `max_bins` bins of similar size; equal values share a bin.

    Returns:
        For each bin (its range as text, bool mask [users]).
    """
    edges = np.unique(np.quantile(values, np.arange(1, max_bins) / max_bins, method="inverted_cdf"))
    bin_ids = np.searchsorted(edges, values)
    bins = []
    for bin_id in np.unique(bin_ids):
        mask = bin_ids == bin_id
        low, high = values[mask].min(), values[mask].max()
        bins.append((f"{low:,}" if low == high else f"{low:,}–{high:,}", mask))
    return bins


def _group_section(run: Run, key: str, title: str, unit: str, plot_name: str) -> Section:
    """Return the section on the metrics of user groups, which are formed by the column `key` of the details."""
    shown = headline_metric(run)
    bins = bin_users(run.details[key])
    rows: list[list[str]] = []
    heights: dict[str, list[float]] = {}
    bounds: list[np.ndarray] = []  # error bars of the model alone keep the plot readable
    names: list[str] = []
    for label, mask in bins:
        metrics = bootstrap_metrics(run, mask=mask)
        names = metrics[run.method].names
        column = names.index(shown)
        values, intervals = metrics[run.method].values(), metrics[run.method].intervals()
        cells = [format_interval(*cell) for cell in zip(values, *intervals, strict=True)]
        rows.append([label, f"{mask.sum():,}", *cells])
        bounds.append(intervals[:, column])
        for model, model_metrics in metrics.items():
            heights.setdefault(model, []).append(model_metrics.values()[column])
    bars = {
        model: (np.array(model_heights), np.stack(bounds, axis=1) if model == run.method else None)
        for model, model_heights in heights.items()
    }
    labels = [label for label, _ in bins]
    alt = "; ".join(
        f"{label}: " + ", ".join(f"{model} {model_heights[row]:.4f}" for model, model_heights in heights.items())
        for row, label in enumerate(labels)
    )
    plot = plots.bars(plot_name, f"{shown} by {unit}. {alt}.", bars, labels, unit, shown)
    table = Table(f"{run.method} by {unit}, {CONFIDENCE}% intervals", [unit, "users", *names], rows)
    return Section(title, tables=[table], plots=[plot])


def _prompt_sections(run: Run) -> list[Section]:
    names = list(run.results["mean_results"])
    metrics: Sequence[Sequence[float]] = [
        [results[name] for name in names] for results in run.results["all_prompt_results"]
    ]
    return prompt_sections(run, names, metrics, "All other metrics on this page are means over the prompts.")


def _codes_section(run: Run) -> Section:
    levels = run.details["index"]["levels"]
    used = ", ".join(f"level {number}: {level['codes_used']:,}" for number, level in enumerate(levels, start=1))
    rows = [
        [str(number), f"{level['codes_used']:,}", f"{level['perplexity']:.1f}", f"{level['items'][0]:,}"]
        for number, level in enumerate(levels, start=1)
    ]
    table = Table("Codes by level", ["level", "codes used", "perplexity", "items of the largest code"], rows)
    plot = plots.codes("codes", f"Items of each code. Codes used, {used}.", [level["items"] for level in levels])
    return Section("Semantic IDs: codes used", tables=[table], plots=[plot])


def _map_section(run: Run) -> Section:
    index = run.details["index"]
    item_map, groups = index["map"], index["groups"]
    points, group_of_point = np.array(item_map["points"]), np.array(item_map["group"])
    num_items = sum(index["levels"][0]["items"])
    is_sample = len(points) < num_items
    shown = f"{len(points):,} of {num_items:,} items, drawn at random," if is_sample else f"{num_items:,} items"
    alt = f"{shown} on a plane, coloured by first code; the largest groups are listed in the table."
    share = " and ".join(f"{component:.0%}" for component in item_map["share"])
    text = [
        f"The axes are the first two principal components of {item_map['source']}, with {share} of the variance. "
        "Colours are the largest first codes."
    ]
    if is_sample:
        text.append(f"The map shows {len(points):,} of {num_items:,} items, drawn at random.")
    rows = [[group["code"], f"{group['items']:,}", "; ".join(group["titles"])] for group in groups]
    table = Table("Largest first codes", ["first code", "items", "most popular items"], rows, texts=(2,))
    plot = plots.item_map("items", alt, points, group_of_point, [group["code"] for group in groups])
    return Section("Semantic IDs: items by first code", text, [table], [plot])
