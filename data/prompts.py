"""The phrasings of each task, read from YAML and checked before anything is trained on them."""

from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import yaml

from errors import InputError

PROMPT_FILE = Path(__file__).with_name("prompts.yaml")

QUESTION_FILE = Path(__file__).with_name("questions.yaml")


class Fields(NamedTuple):
    """What a task's prompt and response must use, and what its prompt may."""

    prompt: set[str]
    response: set[str] = frozenset()
    optional: set[str] = frozenset()


FIELDS = {"seqrec": Fields({"history"}, {"target"}), "seqrec_history": Fields({"history"})}
QUESTION_FIELDS = {
    "text": Fields({"history", "title"}),
    "soft": Fields({"history", "title", "user", "item"}, optional={"history_ids"}),
    "codes": Fields({"history", "title", "user", "item"}),
}


@dataclass(frozen=True)
class Phrasing:
    """One way to say a task: a prompt and a response with fields in braces."""

    prompt: str
    response: str = ""


def read_prompts(path: str | Path = PROMPT_FILE, tasks: dict[str, Fields] = FIELDS) -> dict[str, list[Phrasing]]:
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
        phrasings = content.get(task)
        if not isinstance(phrasings, list) or not phrasings:
            raise InputError(f"{path}: task {task!r} has no phrasing; give it at least one")
        prompts[task] = [_check(path, task, number, phrasing, fields) for number, phrasing in enumerate(phrasings)]
    return prompts


def _check(path: Path, task: str, number: int, phrasing: object, fields: Fields) -> Phrasing:
    where = f"{path}: {task} phrasing {number}"
    keys = {"prompt", "response"} if fields.response else {"prompt"}
    if (
        not isinstance(phrasing, dict)
        or set(phrasing) != keys
        or not all(isinstance(v, str) for v in phrasing.values())
    ):
        raise InputError(f"{where} should have just {' and '.join(sorted(keys))}, each a text")
    for key, wanted, allowed in (("prompt", fields.prompt, fields.optional), ("response", fields.response, set())):
        try:
            found = {field for _, field, _, _ in Formatter().parse(phrasing.get(key, "")) if field is not None}
        except ValueError as error:
            raise InputError(f"{where}: {key} has a stray brace ({error})") from None
        if unknown := found - wanted - allowed:
            raise InputError(f"{where}: {key} has the unknown field {{{unknown.pop()}}}")
        if missing := wanted - found:
            raise InputError(f"{where}: {key} lacks the field {{{missing.pop()}}}")
    if task == "seqrec_history" and not phrasing["prompt"].endswith("{history}"):
        raise InputError(f"{where}: the prompt must end with {{history}}")
    return Phrasing(**phrasing)
