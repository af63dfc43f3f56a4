"""Prompt templates of each task, read from YAML and checked before training."""

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from reclingua.utils.errors import InputError
from reclingua.utils.files import read_yaml

PROMPTS = Path(__file__).parents[2] / "config" / "prompts"
LCREC_PROMPT_FILE, YES_NO_PROMPT_FILE = PROMPTS / "lcrec.yaml", PROMPTS / "yes_no.yaml"

MAX_PROMPT = 100_000  # characters
TARGET = "{target}"
INTENTION_FIELDS = ("user_intention", "item_intention")


class Fields(NamedTuple):
    """Fields of a task's prompt templates: at least one of every set in `prompt` and in `response` is required.

    The prompt can also contain the `optional` fields.
    """

    prompt: list[set[str]]
    response: list[set[str]] = []
    optional: Set[str] = frozenset()


FIELDS = {
    "seqrec": Fields([{"history"}], [{"target"}]),
    "seqrec_history": Fields([{"history"}]),
    "item2index": Fields([{"title", "description"}], [{"target"}]),
    "index2item": Fields([{"target"}], [{"title", "description"}]),
    "fusionseqrec": Fields([{"history", "titles"}], [{"target", "title", "description"}]),
    "itemsearch": Fields([{"preference", *INTENTION_FIELDS}], [{"target"}], optional={"history", "titles"}),
    "preferenceobtain": Fields([{"history", "titles"}], [{"preference"}]),
}
RATES = frozenset({"item_rate", "user_rate"})
YES_NO_FIELDS = {
    "text": Fields([{"history"}, {"title"}], optional=RATES),
    "soft": Fields([{"history"}, {"title"}, {"user"}, {"item"}], optional=RATES | {"history_ids"}),
    "codes": Fields([{"history"}, {"title"}, {"user"}, {"item"}], optional=RATES),
}


@dataclass(frozen=True)
class PromptTemplate:
    """Prompt template: a prompt and a response with fields in braces."""

    prompt: str
    response: str = ""

    @cached_property
    def fields(self) -> frozenset[str]:
        """Fields of prompt and response together."""
        return frozenset(_fields(self.prompt) | _fields(self.response))

    @cached_property
    def around_history(self) -> tuple[str, str] | None:
        """The text before and after {history} in the prompt; None if the prompt has further fields."""
        parts = list(Formatter().parse(self.prompt))
        if [field for _, field, _, _ in parts if field is not None] != ["history"]:
            return None
        return parts[0][0], "".join(text for text, _, _, _ in parts[1:])

    @property
    def has_target_response(self) -> bool:
        """Whether the response is the target's semantic ID, which beam search can find."""
        return self.response in ("", TARGET)


def read_prompts(
    path: str | Path = LCREC_PROMPT_FILE, tasks: dict[str, Fields] = FIELDS
) -> dict[str, list[PromptTemplate]]:
    """Read task -> its prompt templates; InputError names the file, the task and the number of an invalid template."""
    return parse_prompts(path, read_yaml(path, "prompt file"), tasks)


def parse_prompts(path: str | Path, content: object, tasks: dict[str, Fields]) -> dict[str, list[PromptTemplate]]:
    """Return task -> its prompt templates from the content of a prompt file or of a checkpoint's metadata, `path`."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: should map each task to a list of prompt templates")
    prompts = {}
    for task, fields in tasks.items():
        templates = content.get(task)
        if not isinstance(templates, list) or not templates:
            raise InputError(f"{path}: task {task!r} has no prompt template; give it at least one")
        prompts[task] = [_check(path, task, number, template, fields) for number, template in enumerate(templates)]
    return prompts


def check_prompts(path: str | Path, content: dict[str, list]) -> None:
    """Check the prompt templates of a checkpoint's metadata, of whatever tasks, as those of a prompt file."""
    known = FIELDS | YES_NO_FIELDS
    if unknown := sorted(content.keys() - known.keys()):
        raise InputError(f"{path}: has prompt templates of the unknown task {unknown[0]!r}")
    # A template without a response is stored with an empty one.
    written = {
        task: [
            {key: text for key, text in template.items() if (key, text) != ("response", "")}
            if isinstance(template, dict)
            else template
            for template in (templates if isinstance(templates, list) else [])
        ]
        for task, templates in content.items()
    }
    parse_prompts(path, written, {task: known[task] for task in content})


def _check(path: str | Path, task: str, number: int, template: object, fields: Fields) -> PromptTemplate:
    where = f"{path}: {task} prompt template {number}"
    keys = {"prompt", "response"} if fields.response else {"prompt"}
    if (
        not isinstance(template, dict)
        or set(template) != keys
        or not all(isinstance(v, str) for v in template.values())
    ):
        raise InputError(f"{where} should have just {' and '.join(sorted(keys))}, each a text")
    if max(map(len, template.values())) > MAX_PROMPT:
        raise InputError(f"{where} has more than {MAX_PROMPT:,} characters; shorten it")
    for key, choices, optional in (("prompt", fields.prompt, fields.optional), ("response", fields.response, set())):
        try:
            names = _fields(template.get(key, ""))
        except ValueError as error:
            raise InputError(f"{where}: {key} has a stray brace or a format ({error})") from None
        if unknown := names - set(optional).union(*choices):
            raise InputError(f"{where}: {key} has the unknown field {{{min(unknown)}}}")
        for choice in choices:
            if not names & choice:
                lacking = " or ".join(f"{{{field}}}" for field in sorted(choice))
                raise InputError(f"{where}: {key} lacks the field {lacking}")
    if fields.response == [{"target"}] and template["response"] != TARGET:
        raise InputError(f"{where}: the response must be {TARGET} and nothing else; other words belong to the prompt")
    if task == "seqrec_history" and not template["prompt"].endswith("{history}"):
        raise InputError(f"{where}: the prompt must end with {{history}}")
    return PromptTemplate(**template)


def _fields(text: str) -> set[str]:
    """Return the names of the fields; ValueError for a format or conversion, which plain texts cannot fill."""
    names = set()
    for _, name, spec, conversion in Formatter().parse(text):
        if name is None:
            continue
        if spec or conversion:
            raise ValueError(f"{{{name}}} should stand alone in its braces")
        names.add(name)
    return names
