"""Comparison of several runs on the same users: their metrics, and paired differences to the first run."""

from types import ModuleType

import numpy as np

from reclingua.reporting import next_item, plots, yes_no
from reclingua.reporting.bootstrap import (
    CONFIDENCE,
    SIGNIFICANCE_NOTE,
    BootstrapMetrics,
    Difference,
    paired_differences,
)
from reclingua.reporting.details import Run
from reclingua.reporting.html import Section, Table, format_difference, format_interval, format_number
from reclingua.utils.errors import InputError

KINDS: dict[str, ModuleType] = {"next_item": next_item, "yes_no": yes_no}


def check_comparable(runs: list[Run]) -> None:
    """Raise InputError unless all runs measured the same users (or ratings) of one dataset."""
    first = runs[0]
    for run in runs[1:]:
        if run.kind != first.kind:
            raise InputError(
                f"{run.file}: is a {run.kind} test, {first.file} a {first.kind} test; compare runs of one kind"
            )
        if run.details["dataset"] != first.details["dataset"]:
            raise InputError(
                f"{run.file}: is on dataset {run.details['dataset']}, {first.file} on {first.details['dataset']}; "
                "compare runs on one dataset"
            )
        module = KINDS[run.kind]
        for name, values in module.paired_keys(run).items():
            if not np.array_equal(values, module.paired_keys(first)[name]):
                raise InputError(
                    f"{run.file}: its {name} differ from those of {first.file}; test both on the same data, with the "
                    "same --test_task and --sample_num"
                )


def common_metrics(runs: dict[str, Run]) -> dict[str, BootstrapMetrics]:
    """Return name of a run -> the metrics that all runs have."""
    first = next(iter(runs.values()))
    if first.kind == "yes_no":
        return {name: yes_no.bootstrap_metrics(run)[run.method] for name, run in runs.items()}
    names = [
        name
        for name in first.results["mean_results"]
        if all(name in run.results["mean_results"] for run in runs.values())
    ]
    if not names:
        raise InputError(
            f"{first.file}: has no metric in common with the other runs; test them with the same --metrics"
        )
    return {name: next_item.bootstrap_metrics(run, names)[run.method] for name, run in runs.items()}


def comparison_tables(runs: dict[str, Run]) -> tuple[Table, Table, list[list[Difference]]]:
    """Return (metrics of each run, differences to the first run, the same as numbers [runs - 1][metrics])."""
    (base, base_metrics), *others = common_metrics(runs).items()
    columns = ["", *base_metrics.names]
    metric_rows = [
        [name, *(format_interval(*cell) for cell in zip(metrics.values(), *metrics.intervals(), strict=True))]
        for name, metrics in [(base, base_metrics), *others]
    ]
    differences = [paired_differences(metrics, base_metrics) for _, metrics in others]
    difference_rows = [
        [f"{name} - {base}", *(format_difference(*difference) for difference in row)]
        for (name, _), row in zip(others, differences, strict=True)
    ]
    return (
        Table(f"Metrics, {CONFIDENCE}% intervals", columns, metric_rows),
        Table(f"Differences, {CONFIDENCE}% intervals", columns, difference_rows),
        differences,
    )


def comparison_sections(
    runs: dict[str, Run], metrics: Table, compared: Table, differences: list[list[Difference]]
) -> list[Section]:
    """Return the sections of the page from the result of `comparison_tables`."""
    base, *others = runs
    num_significant = sum(difference.is_significant for row in differences for difference in row)
    text = [
        f"Paired differences to {base} on the same users. {SIGNIFICANCE_NOTE} "
        f"{num_significant} of {sum(map(len, differences))} are significant."
    ]
    rows = [
        (f"{metric}: {name} - {base}", row[column])
        for column, metric in enumerate(compared.columns[1:])
        for name, row in zip(others, differences, strict=True)
        if not np.isnan(row[column].value)
    ]
    alt = "; ".join(f"{name} {format_difference(*difference)}" for name, difference in rows)
    plot = plots.forest("differences", f"Differences with their intervals. {alt}.", rows)
    return [
        Section("Metrics", tables=[metrics]),
        Section("Differences", text, [compared], [plot]),
        _curve_section(runs),
        _settings_section(runs),
    ]


def _curve_section(runs: dict[str, Run]) -> Section:
    """Return the section with the runs' ROC curves, or HR@k over k."""
    first = next(iter(runs.values()))
    if first.kind == "yes_no":
        lines = {name: yes_no.roc_curve(run.details["labels"], run.details["scores"]) for name, run in runs.items()}
        areas = "; ".join(f"{name}: AUC {format_number(run.results['test']['auc'])}" for name, run in runs.items())
        return Section("ROC curve", plots=[plots.lines("roc", f"ROC curves. {areas}.", lines, *yes_no.ROC_AXES)])
    names = [f"hit@{k}" for k in range(1, min(run.results["num_beams"] for run in runs.values()) + 1)]
    lines = {
        name: next_item.hit_curve(next_item.bootstrap_metrics(run, names)[run.method]) for name, run in runs.items()
    }
    alt = "; ".join(f"{name} {line.y[-1]:.4f} at k = {len(names)}" for name, line in lines.items())
    return Section("HR@k against k", plots=[plots.lines("hr-at-k", f"{alt}.", lines, "k", "HR@k")])


def _settings_section(runs: dict[str, Run]) -> Section:
    """Return the table of flags that differ: a difference in metrics can be due to them."""
    arguments = {name: run.results["arguments"] for name, run in runs.items()}
    keys = sorted({key for flags in arguments.values() for key in flags})
    rows = [[key, *(str(flags.get(key, "")) for flags in arguments.values())] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    table = Table("Flags with different values", ["", *runs], rows, texts=tuple(range(1, 1 + len(runs))))
    return Section("Different settings", tables=[table])
