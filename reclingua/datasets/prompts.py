"""The phrasings of each task, read from YAML and checked before anything is trained on them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import yaml

from reclingua.utils.errors import InputError

PROMPTS = Path(__file__).parents[2] / "config" / "prompts"
LCREC_PROMPT_FILE, YES_NO_PROMPT_FILE = PROMPTS / "lcrec.yaml", PROMPTS / "yes_no.yaml"

TARGET = "{target}"
INTENTION_FIELDS = ("user_intention", "item_intention")


class Fields(NamedTuple):
    """What a task's phrasings fill in: of every set of `prompt` and of `response` at least one field.

    `optional` fields may stand in the prompt besides.
    """

    prompt: list[set[str]]
    response: list[set[str]] = []
    optional: set[str] = frozenset()


FIELDS = {
    "seqrec": Fields([{"history"}], [{"target"}]),
    "seqrec_history": Fields([{"history"}]),
    "item2index": Fields([{"title", "description"}], [{"target"}]),
    "index2item": Fields([{"target"}], [{"title", "description"}]),
    "fusionseqrec": Fields([{"history", "titles"}], [{"target", "title", "description"}]),
    "itemsearch": Fields([{"preference", *INTENTION_FIELDS}], [{"target"}], optional={"history", "titles"}),
    "preferenceobtain": Fields([{"history", "titles"}], [{"preference"}]),
}
YES_NO_FIELDS = {
    "text": Fields([{"history"}, {"title"}]),
    "soft": Fields([{"history"}, {"title"}, {"user"}, {"item"}], optional={"history_ids"}),
    "codes": Fields([{"history"}, {"title"}, {"user"}, {"item"}]),
}


@dataclass(frozen=True)
class PromptTemplate:
    """One way to say a task: a prompt and a response with fields in braces."""

    prompt: str
    response: str = ""

    @cached_property
    def fields(self) -> frozenset[str]:
        """What it fills in, prompt and response together."""
        return frozenset(_fields(self.prompt) | _fields(self.response))

    @property
    def names_target(self) -> bool:
        """Whether what it answers is the target's index, so that a search can find it."""
        return self.response in ("", TARGET)


def read_prompts(
    path: str | Path = LCREC_PROMPT_FILE, tasks: dict[str, Fields] = FIELDS
) -> dict[str, list[PromptTemplate]]:
    """Each of `tasks` -> its phrasings. InputError names the file, the task and the number of one that is wrong."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such prompt file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: should map each task to a list of phrasings")
    prompts = {}
    for task, fields in tasks.items():
        templates = content.get(task)
        if not isinstance(templates, list) or not templates:
            raise InputError(f"{path}: task {task!r} has no phrasing; give it at least one")
        prompts[task] = [_check(path, task, number, template, fields) for number, template in enumerate(templates)]
    return prompts


def _check(path: Path, task: str, number: int, template: object, fields: Fields) -> PromptTemplate:
    where = f"{path}: {task} phrasing {number}"
    keys = {"prompt", "response"} if fields.response else {"prompt"}
    if (
        not isinstance(template, dict)
        or set(template) != keys
        or not all(isinstance(v, str) for v in template.values())
    ):
        raise InputError(f"{where} should have just {' and '.join(sorted(keys))}, each a text")
    for key, wanted, optional in (("prompt", fields.prompt, fields.optional), ("response", fields.response, set())):
        try:
            found = _fields(template.get(key, ""))
        except ValueError as error:
            raise InputError(f"{where}: {key} has a stray brace or a format ({error})") from None
        if unknown := found - optional.union(*wanted):
            raise InputError(f"{where}: {key} has the unknown field {{{min(unknown)}}}")
        for choice in wanted:
            if not found & choice:
                lacking = " or ".join(f"{{{field}}}" for field in sorted(choice))
                raise InputError(f"{where}: {key} lacks the field {lacking}")
    if fields.response == [{"target"}] and template["response"] != TARGET:
        raise InputError(f"{where}: the response must be {TARGET} and nothing else; other words belong to the prompt")
    if task == "seqrec_history" and not template["prompt"].endswith("{history}"):
        raise InputError(f"{where}: the prompt must end with {{history}}")
    return PromptTemplate(**template)


def _fields(text: str) -> set[str]:
    """ValueError for a text that `str.format` cannot fill with plain texts."""
    fields = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    if formatted := next((field for field, how, conversion in fields if how or conversion), None):
        raise ValueError(f"{{{formatted}}} should stand alone in its braces")
    return {field for field, *_ in fields}
