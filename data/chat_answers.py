"""What a chat model answered: cleaned, checked, and kept in a journal, so that nothing is asked twice."""

import fcntl
import json
import re
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Self

from reclingua.utils.errors import InputError
from reclingua.utils.files import output_file

SHORTEST, LONGEST = 10, 500  # characters
TITLE_RUN, CIRCLE_RUN, PROMPT_RUN = 5, 4, 8  # words
BRACKETS = r"[(\[](.*?)[)\]]"


class Request(NamedTuple):
    """A prompt for a chat model; `phrasing` is what it was made from, `title` what the answer must not name."""

    prompt: str
    template: str
    title: str = ""

    @property
    def key(self) -> str:
        """The same for the same prompt and title, which are therefore asked about once."""
        return sha256(f"{self.title}\n{self.prompt}".encode()).hexdigest()[:24]


def to_single_line(text: str) -> str:
    """`text` in one line of characters that can be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def clean_answer(text: str, complete: bool) -> str:
    """The first paragraph of an answer, without quotes, list marks or what the model thought aloud.

    Args:
        complete: False where the answer was cut off; it then ends with its last whole sentence.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    paragraphs = [to_single_line(paragraph) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    # "Sure, here is one:" and the like come before the answer.
    at = next((i for i, paragraph in enumerate(paragraphs) if not paragraph.endswith(":")), None)
    if at is None:
        return ""
    answer = paragraphs[at]
    if not complete and at == len(paragraphs) - 1:
        answer = answer[: max(answer.rfind(mark) for mark in ".!?。！？") + 1]
    return re.sub(r"^([-*•]|\d+[.)])\s+", "", answer).replace("**", "").strip(" \"'“”‘’`")


def rejection_reason(text: str, request: Request) -> str | None:
    """What makes a cleaned answer useless; None if nothing does.

    An answer names a title if it has the title, or five words of it in a row; what the title has in brackets may be
    missing (a year), or be a name by itself ("Seven (Se7en)").
    """
    said = _words(text)
    if "\ufffd" in text:
        return "cannot be read"
    if len(text) < SHORTEST or not said:
        return "empty or too short"
    if len(text) > LONGEST:
        return "too long"
    in_brackets = [name for name in re.findall(BRACKETS, request.title) if not name.isdecimal()]
    names = [request.title, re.sub(BRACKETS, " ", request.title), *in_brackets]
    if any(_runs(said, name, TITLE_RUN) for name in names):
        return "names the item"
    if _runs(said, request.template, PROMPT_RUN) or _within(said, _words(request.prompt)):
        return "repeats the prompt"
    parts = Counter(tuple(said[i : i + CIRCLE_RUN]) for i in range(len(said) - CIRCLE_RUN + 1))
    if max(parts.values(), default=0) > 1:
        return "goes round in circles"
    return None


def _words(text: str) -> list[str]:
    # Each character of scripts that put no space between words counts as one.
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.casefold())


def _within(part: list[str], whole: list[str]) -> bool:
    return f" {' '.join(part)} " in f" {' '.join(whole)} "


def _runs(said: list[str], text: str, length: int) -> bool:
    """Whether `length` words in a row of `text`, or all if it has fewer, are among those said in a row."""
    words = _words(text)
    length = min(length, len(words))
    return bool(words) and any(_within(words[i : i + length], said) for i in range(len(words) - length + 1))


class ResponseCache:
    """The answers so far, a line of JSON each; what a run that was cut short leaves to the next one.

    `texts`: key of a request -> its text; `refused`: key -> how many answers were refused; `faults`: why, counted.

    Args:
        made_with: what the answers depend on; it is the first line.

    Raises:
        InputError: the file is another run's, was begun with something else, or cannot be read or written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, object]):
        self.path, self.made_with = path, dict(made_with)
        self.texts: dict[str, str] = {}
        self.refused: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._begun = False

    def __enter__(self) -> Self:
        output_file(self.path)
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            content = self._file.read()
        except BlockingIOError:
            raise InputError(f"{self.path}: another run is writing to it; let it end") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        whole = content[: content.rfind(b"\n") + 1]  # whoever was killed may have left half a line
        try:
            for number, line in enumerate(whole.splitlines(), start=1):
                self._read(number, line)
        except InputError:
            self._file.close()
            raise
        self._file.truncate(len(whole))
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if not len(self):
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """How many answers it holds."""
        return len(self.texts) + self.refused.total()

    def is_done(self, request: Request, attempts: int) -> bool:
        return request.key in self.texts or self.refused[request.key] >= attempts

    def add(self, request: Request, text: str, why_refused: str | None) -> None:
        if not self._begun:
            self._write(self.made_with)
            self._begun = True
        self._write({"of": request.key, **({"refused": why_refused} if why_refused else {"text": text})})
        self._count(request.key, text, why_refused)

    def _count(self, key: str, text: str, why_refused: str | None) -> None:
        if why_refused:
            self.refused[key] += 1
            self.faults[why_refused] += 1
        else:
            self.texts[key] = text

    def _write(self, record: Mapping[str, object]) -> None:
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if number == 1 and isinstance(record, dict) and record != self.made_with:
            other = [name for name, value in self.made_with.items() if record.get(name) != value]
            raise InputError(
                f"{self.path}: was begun with other {', '.join(other) or 'settings'}; "
                "go on with those, or delete the file"
            )
        if number == 1 and record == self.made_with:
            self._begun = True
            return
        given = (record.get("text"), record.get("refused")) if isinstance(record, dict) else ()
        if number == 1 or [type(each) for each in given].count(str) != 1 or not isinstance(record.get("of"), str):
            raise InputError(f"{self.path}: line {number} is not one of a journal; delete the file")
        self._count(record["of"], given[0] or "", given[1])
