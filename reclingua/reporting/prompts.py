"""The section on phrasings that all reports have of models that are asked in words: each one's text and figures."""

from collections.abc import Sequence

from reclingua.reporting.details import Run
from reclingua.reporting.html import Section, Table, number
from reclingua.utils.text import shorten

LONGEST = 400  # letters of a text


def templates(run: Run, columns: list[str], figures: list[Sequence[float | None]], others: str) -> list[Section]:
    """Each one's text; of several also their `figures` [phrasings][columns] and the spread of these.

    `others`: what the other figures of the page are, said where there are several phrasings.
    """
    texts = run.evidence["phrasings"]
    if not texts:
        return []
    names = [f"phrasing {at}" for at in run.results["test_prompt_ids"]]
    said = [[name, shorten(" ".join(text.split()), LONGEST)] for name, text in zip(names, texts, strict=True)]
    asked = Table("Text of each phrasing", ["", "text"], said, texts=(1,))
    if len(texts) == 1:
        return [Section("Phrasings", tables=[asked])]
    rows = [[name, *map(number, each)] for name, each in zip(names, figures, strict=True)]
    for name, of in (("mean", lambda values: sum(values) / len(values)), ("lowest", min), ("highest", max)):
        spread = [None if None in values else of(values) for values in zip(*figures, strict=True)]
        rows.append([name, *map(number, spread)])
    measured = Table("Metrics of each phrasing", ["", *columns], rows)
    return [Section("Phrasings", [others], [measured, asked])]
