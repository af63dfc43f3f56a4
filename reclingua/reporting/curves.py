"""Training section of a report: logged loss and validation metrics."""

from typing import Any

from reclingua.reporting import plots
from reclingua.reporting.details import Run
from reclingua.reporting.html import Section
from reclingua.reporting.plots import Line


def training_section(run: Run) -> Section:
    """Return the section with the curves of the checkpoint's run.json, or with a note that they are missing."""
    curves = run.details["curves"]
    losses: dict[str, list[Any]] = {}
    metrics: dict[str, list[Any]] = {}
    if curves:
        losses = {"training": curves["loss"], "validation": curves["valid"].get("loss", [])}
        metrics = {name: points for name, points in curves["valid"].items() if name != "loss"}
    panels = {
        title: {name: Line(*zip(*points, strict=True)) for name, points in named_points.items() if points}
        for title, named_points in (("loss", losses), ("validation", metrics))
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return Section("Training", ["The checkpoint has no training log (run.json), so there are no curves."])
    ends = "; ".join(
        f"{title}, {name}: from {line.y[0]:.4f} to {line.y[-1]:.4f}"
        for title, lines in panels.items()
        for name, line in lines.items()
    )
    text = [] if metrics else ["No validation metric was logged during training."]
    return Section("Training", text, plots=[plots.curves("training", f"{ends}.", curves["over"], panels)])
