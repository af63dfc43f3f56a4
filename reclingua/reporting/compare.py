"""Runs side by side: the same users, and which differences to the first run are real."""

import numpy as np

from reclingua.reporting import next_item, plots, yes_no
from reclingua.reporting.bootstrap import BootstrapMetrics, differences
from reclingua.reporting.details import Run
from reclingua.reporting.html import Section, Table, number, with_interval
from reclingua.utils.errors import InputError

KINDS = {"search": next_item, "preference": yes_no}


def check_alike(runs: list[Run]) -> None:
    """InputError unless all runs measured the same users (or ratings) of one dataset."""
    first = runs[0]
    for run in runs[1:]:
        if run.kind != first.kind:
            raise InputError(
                f"{run.file}: is of a {run.kind} test, {first.file} of a {first.kind} test; compare alike"
            )
        if run.evidence["dataset"] != first.evidence["dataset"]:
            raise InputError(
                f"{run.file}: is of dataset {run.evidence['dataset']}, {first.file} of {first.evidence['dataset']}; "
                "only runs on one dataset can be compared"
            )
        module = KINDS[run.kind]
        for name, values in module.paired_keys(run).items():
            if not np.array_equal(values, module.paired_keys(first)[name]):
                raise InputError(
                    f"{run.file}: its {name} are not those of {first.file}; test both on the same data, with one "
                    "--test_task and --sample_num"
                )


def figures_of(runs: dict[str, Run]) -> dict[str, BootstrapMetrics]:
    """Name of a run -> what all of them measured."""
    first = next(iter(runs.values()))
    if first.kind == "preference":
        return {name: yes_no.figures(run)[run.method] for name, run in runs.items()}
    metrics = [
        m for m in first.results["mean_results"] if all(m in run.results["mean_results"] for run in runs.values())
    ]
    if not metrics:
        raise InputError(
            f"{first.file}: has no metric in common with the other runs; test them with the same --metrics"
        )
    return {name: next_item.figures(run, metrics)[run.method] for name, run in runs.items()}


def tables(runs: dict[str, Run]) -> tuple[Table, Table, list[list[tuple[float, float, float, bool]]]]:
    """(each run's figures, their differences to the first run's, the same as numbers [runs - 1, figures])."""
    figures = figures_of(runs)
    (base, of_base), *others = figures.items()
    columns = ["", *of_base.names]
    values = [
        [name, *(with_interval(*each) for each in zip(of.values(), *of.intervals(), strict=True))]
        for name, of in figures.items()
    ]
    found = [differences(of, of_base) for _, of in others]
    rows = [
        [f"{name} - {base}", *(next_item.difference(*each) for each in row)]
        for (name, _), row in zip(others, found, strict=True)
    ]
    return Table("Metrics and their intervals", columns, values), Table("Differences", columns, rows), found


def sections(runs: dict[str, Run], metrics: Table, compared: Table, found: list) -> list[Section]:
    """The page's sections from what `tables` returned."""
    base, *others = runs
    real = sum(each[-1] for row in found for each in row)
    text = [
        f"Differences to {base}, on the same users: real (*) if the interval does not hold 0. "
        f"{real} of {sum(map(len, found))} are."
    ]
    rows = [
        (f"{metric}: {name} - {base}", row[at])
        for at, metric in enumerate(compared.columns[1:])
        for name, row in zip(others, found, strict=True)
        if not np.isnan(row[at][0])
    ]
    alt = "; ".join(f"{name} {next_item.difference(*each)}" for name, each in rows)
    picture = plots.forest("differences", f"Differences and their intervals. {alt}.", rows)
    return [
        Section("Metrics", tables=[metrics]),
        Section("Differences", text, [compared], [picture]),
        *_curves(runs),
        _settings(runs),
    ]


def _curves(runs: dict[str, Run]) -> list[Section]:
    first = next(iter(runs.values()))
    if first.kind == "preference":
        given = {name: yes_no.roc(run.evidence["labels"], run.evidence["scores"]) for name, run in runs.items()}
        axes = ("share of what was not liked", "share of what was liked", "chance")
        areas = "; ".join(f"{name}: AUC {number(run.results['test']['auc'])}" for name, run in runs.items())
        picture = plots.lines("roc", f"ROC curves of all ratings. {areas}.", given, *axes)
        return [Section("ROC curve", pictures=[picture])]
    names = [f"hit@{k}" for k in range(1, min(run.results["num_beams"] for run in runs.values()) + 1)]
    given = {name: next_item.hits_by_k(next_item.figures(run, names)[run.method]) for name, run in runs.items()}
    alt = "; ".join(f"{name} {line.y[-1]:.4f} at k = {len(names)}" for name, line in given.items())
    return [Section("HR@k against k", pictures=[plots.lines("hr-at-k", f"{alt}.", given, "k", "HR@k")])]


def _settings(runs: dict[str, Run]) -> Section:
    """What the runs were asked for, so that nobody compares what was measured in two ways unawares."""
    given = {name: run.results["arguments"] for name, run in runs.items()}
    keys = sorted({key for each in given.values() for key in each})
    rows = [
        [key, *(str(each.get(key, "")) for each in given.values())]
        for key in keys
        if len({str(each.get(key, "")) for each in given.values()}) > 1
    ]
    table = Table("Flags that differ", ["", *runs], rows, texts=tuple(range(1, 1 + len(runs))))
    return Section("What was asked differently", tables=[table])
