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
