"""Tables of a report that set a model beside its baselines and its fusions with them."""

from collections.abc import Mapping

from reclingua.reporting.bootstrap import CONFIDENCE, BootstrapMetrics, paired_differences
from reclingua.reporting.details import Run
from reclingua.reporting.html import Table, format_difference, format_interval


def baseline_tables(run: Run, metrics: Mapping[str, BootstrapMetrics]) -> list[Table]:
    """Return two tables: the metrics of all rows; the differences of the model, and of its fusions, to the others.

    Args:
        metrics: name of a row -> its metrics on the same users.
    """
    columns = ["", *metrics[run.method].names]
    rows = [
        [name, *(format_interval(*cell) for cell in zip(values.values(), *values.intervals(), strict=True))]
        for name, values in metrics.items()
    ]
    pairs = [(run.method, name) for name in run.details["baselines"]]
    pairs += [(fused, name) for fused in run.details["fused"] for name in (run.method, *run.details["baselines"])]
    differences = [
        [
            f"{left} - {right}",
            *(format_difference(*cell) for cell in paired_differences(metrics[left], metrics[right])),
        ]
        for left, right in pairs
    ]
    tables = [Table(f"Metrics, {CONFIDENCE}% intervals", columns, rows)]
    if differences:
        tables.append(Table(f"Differences, {CONFIDENCE}% intervals", columns, differences))
    return tables


def worth_of_model(run: Run, metrics: Mapping[str, BootstrapMetrics], shown: str) -> list[str]:
    """Return the sentence on what the model adds to a fusion of baselines, [] for a run without --fuse.

    Args:
        shown: name of the metric that it states.
    """
    if not run.details["worth"]:
        return []
    fused, without = run.details["worth"]
    column = metrics[fused].names.index(shown)
    values = [float(metrics[name].values()[column]) for name in (fused, without)]
    difference = paired_differences(metrics[fused], metrics[without])[column]
    verdict = "significant" if difference.is_significant else "not significant"
    return [
        f"What {run.method} adds to the baselines: {shown} is {values[0]:.4f} with it ({fused}) and {values[1]:.4f} "
        f"without it ({without}), a difference of {difference.value:+.4f} [{difference.low:+.4f}, "
        f"{difference.high:+.4f}], {verdict}."
    ]
