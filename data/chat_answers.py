"""Answers of a chat model: cleaning, validation, and a journal that caches them between runs."""

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

MIN_LENGTH, MAX_LENGTH = 10, 500  # characters
TITLE_NGRAM, REPEATED_NGRAM, PROMPT_NGRAM = 5, 4, 8  # words
BRACKETS = r"[(\[](.*?)[)\]]"


class Request(NamedTuple):
    """A prompt for a chat model, its prompt template, and the title that the answer must not leak."""

    prompt: str
    template: str
    title: str = ""

    @property
    def key(self) -> str:
        """Hash of prompt and title: equal requests are asked once."""
        return sha256(f"{self.title}\n{self.prompt}".encode()).hexdigest()[:24]


def to_single_line(text: str) -> str:
    """Return `text` as one line of printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def clean_answer(text: str, is_complete: bool) -> str:
    """Return the first paragraph of an answer, without quotes, list markers and reasoning.

    Args:
        is_complete: False if the answer was cut off; it then ends with its last complete sentence.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    paragraphs = [to_single_line(paragraph) for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    # Skip introductions such as "Sure, here is one:".
    index = next((i for i, paragraph in enumerate(paragraphs) if not paragraph.endswith(":")), None)
    if index is None:
        return ""
    answer = paragraphs[index]
    if not is_complete and index == len(paragraphs) - 1:
        answer = answer[: max(answer.rfind(mark) for mark in ".!?。！？") + 1]
    return re.sub(r"^([-*•]|\d+[.)])\s+", "", answer).replace("**", "").strip(" \"'“”‘’`")


def rejection_reason(text: str, request: Request) -> str | None:
    """Return why a cleaned answer is rejected; None if it is accepted.

    An answer names the item if it contains the title, or five consecutive words of it; text in brackets can be missing
    (a year), or be a name of its own ("Seven (Se7en)").
    """
    words = _split_words(text)
    if "\ufffd" in text:
        return "not decodable"
    if len(text) < MIN_LENGTH or not words:
        return "empty or too short"
    if len(text) > MAX_LENGTH:
        return "too long"
    bracketed = [name for name in re.findall(BRACKETS, request.title) if not name.isdecimal()]
    names = [request.title, re.sub(BRACKETS, " ", request.title), *bracketed]
    if any(_shares_ngram(words, name, TITLE_NGRAM) for name in names):
        return "names the item"
    if _shares_ngram(words, request.template, PROMPT_NGRAM) or _contains(_split_words(request.prompt), words):
        return "repeats the prompt"
    ngrams = Counter(tuple(words[i : i + REPEATED_NGRAM]) for i in range(len(words) - REPEATED_NGRAM + 1))
    if max(ngrams.values(), default=0) > 1:
        return "repeats itself"
    return None


def _split_words(text: str) -> list[str]:
    # In scripts without spaces between words, every character counts as a word.
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+", text.casefold())


def _contains(words: list[str], part: list[str]) -> bool:
    return f" {' '.join(part)} " in f" {' '.join(words)} "


def _shares_ngram(words: list[str], text: str, length: int) -> bool:
    """Return whether `words` contain `length` consecutive words of `text`, or all of them if it has fewer."""
    text_words = _split_words(text)
    length = min(length, len(text_words))
    ngrams = (text_words[i : i + length] for i in range(len(text_words) - length + 1))
    return bool(text_words) and any(_contains(words, ngram) for ngram in ngrams)


class ResponseCache:
    """Journal of answers, one JSON object a line, from which an interrupted run resumes; locked while open.

    `texts`: key of a request -> accepted text; `num_rejected`: key -> number of rejected answers; `reasons`: reason of
    rejection -> count.

    Args:
        made_with: settings that the answers depend on; the first line.

    Raises:
        InputError: another run has locked the file, it was made with other settings, or cannot be read or written.
    """

    def __init__(self, path: Path, made_with: Mapping[str, object]):
        self.path, self.made_with = path, dict(made_with)
        self.texts: dict[str, str] = {}
        self.num_rejected: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._has_header = False

    def __enter__(self) -> Self:
        output_file(self.path)
        try:
            self._file = self.path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            content = self._file.read()
        except BlockingIOError:
            raise InputError(f"{self.path}: another run is writing to it; wait for its end") from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None
        complete = content[: content.rfind(b"\n") + 1]  # a killed run can leave half a line
        try:
            for number, line in enumerate(complete.splitlines(), start=1):
                self._read_line(number, line)
        except InputError:
            self._file.close()
            raise
        self._file.truncate(len(complete))
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if not len(self):
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Number of answers, accepted and rejected."""
        return len(self.texts) + self.num_rejected.total()

    def is_done(self, request: Request, attempts: int) -> bool:
        """Return whether a request has an accepted text, or `attempts` rejected ones."""
        return request.key in self.texts or self.num_rejected[request.key] >= attempts

    def add(self, request: Request, text: str, reason: str | None) -> None:
        """Write an answer to the file; `reason` of its rejection, None if it is accepted."""
        if not self._has_header:
            self._write_line(self.made_with)
            self._has_header = True
        self._write_line({"request": request.key, **({"rejected": reason} if reason else {"text": text})})
        self._count(request.key, text, reason)

    def _count(self, key: str, text: str, reason: str | None) -> None:
        if reason:
            self.num_rejected[key] += 1
            self.reasons[reason] += 1
        else:
            self.texts[key] = text

    def _write_line(self, record: Mapping[str, object]) -> None:
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _read_line(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if number == 1 and isinstance(record, dict) and record != self.made_with:
            names = [name for name, value in self.made_with.items() if record.get(name) != value]
            raise InputError(
                f"{self.path}: was made with other {', '.join(names) or 'settings'}; use the same, or delete the file"
            )
        if number == 1 and record == self.made_with:
            self._has_header = True
            return
        text, reason = (record.get("text"), record.get("rejected")) if isinstance(record, dict) else (None, None)
        has_one = isinstance(text, str) != isinstance(reason, str)
        if number == 1 or not has_one or not isinstance(record.get("request"), str):
            raise InputError(f"{self.path}: line {number} is no journal entry; delete the file")
        self._count(record["request"], text or "", reason)
