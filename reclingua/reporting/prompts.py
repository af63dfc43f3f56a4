"""Prompt section of a report: text and metrics of each prompt template, for models that read text."""

from collections.abc import Sequence

from reclingua.reporting.details import Run
from reclingua.reporting.html import Section, Table, format_number
from reclingua.utils.text import shorten

MAX_LENGTH = 400  # letters of a prompt


def prompt_sections(
    run: Run, columns: list[str], metrics: Sequence[Sequence[float | None]], note: str
) -> list[Section]:
    """Return the section with each prompt's text, [] for a model without prompts.

    With several prompts it also has their `metrics` [prompts][columns], mean, minimum and maximum, below `note`.
    """
    prompts = run.details["prompts"]
    if not prompts:
        return []
    names = [f"prompt {prompt_id}" for prompt_id in run.results["test_prompt_ids"]]
    texts = [[name, shorten(" ".join(text.split()), MAX_LENGTH)] for name, text in zip(names, prompts, strict=True)]
    text_table = Table("Prompt templates", ["", "text"], texts, texts=(1,))
    if len(prompts) == 1:
        return [Section("Prompts", tables=[text_table])]
    rows = [[name, *map(format_number, values)] for name, values in zip(names, metrics, strict=True)]
    for name, reduce in (("mean", lambda values: sum(values) / len(values)), ("min", min), ("max", max)):
        reduced = [None if None in values else reduce(values) for values in zip(*metrics, strict=True)]
        rows.append([name, *map(format_number, reduced)])
    return [Section("Prompts", [note], [Table("Metrics by prompt", ["", *columns], rows), text_table])]
