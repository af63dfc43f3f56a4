"""The section on training that all reports have: loss and valid metrics as they were logged."""

from reclingua.reporting import plots
from reclingua.reporting.details import Run
from reclingua.reporting.html import Section
from reclingua.reporting.plots import Line


def training(run: Run) -> Section:
    """Curves of the checkpoint's run.json, as far as there are any."""
    curves = run.evidence["curves"]
    losses = {"training": curves["loss"], "valid": curves["valid"].get("loss", [])} if curves else {}
    valid = {name: points for name, points in curves["valid"].items() if name != "loss"} if curves else {}
    panels = {
        title: {name: Line(*zip(*points, strict=True)) for name, points in given.items() if points}
        for title, given in (("loss", losses), ("valid", valid))
    }
    panels = {title: given for title, given in panels.items() if given}
    if not panels:
        return Section("Training", ["The checkpoint has no log of its training (run.json), so there are no curves."])
    ends = "; ".join(
        f"{title}, {name}: from {line.y[0]:.4f} to {line.y[-1]:.4f}"
        for title, given in panels.items()
        for name, line in given.items()
    )
    text = [] if valid else ["Nothing was measured on valid during training."]
    return Section("Training", text, pictures=[plots.curves("training", f"{ends}.", curves["over"], panels)])
