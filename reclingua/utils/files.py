"""File helpers: validated JSON, YAML, atomic writes, checks of output paths."""

import json
import os
import re
from pathlib import Path

import yaml

from reclingua.utils.errors import InputError

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path, what: str) -> dict:
    """Return the content of a JSON file, a non-empty object; `what` describes it in the InputError otherwise."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        content = json.loads(text, object_pairs_hook=_reject_duplicates)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it should contain {what}") from None
    except _DuplicateKey as error:
        raise InputError(f"{path}: the key {error.args[0]!r} occurs twice; keep one") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}; repair the file") from None
    except (OSError, ValueError) as error:  # not UTF-8, or a number of thousands of digits
        raise InputError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; it should contain {what}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: contains a {type(content).__name__}; it should contain {what}, as a JSON object")
    if not content:
        raise InputError(f"{path}: is empty; it should contain {what}")
    if _ESCAPED_SURROGATE.search(text) and (key := _undecodable_key(content)) is not None:
        raise InputError(f"{path}: the entry {key!r} contains half a character, an escape like \\ud83d; repair it")
    return content


def read_yaml(path: str | Path, kind: str) -> object:
    """Return the content of a YAML file; InputError if it is not readable, `kind` ("preset") names a missing one."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such {kind}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({error})") from None


class _DuplicateKey(Exception):
    """A JSON object has the key `args[0]` twice."""


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(key[:80])
            seen.add(key)
    return content


def _undecodable_key(content: dict) -> str | None:
    """Return the first key whose entry has a lone surrogate, which no file and no terminal can represent."""
    for key, value in content.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return ascii(key)[1:-1][:80]
    return None


def write_json(path: Path, content: dict | list, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


class atomic_write:  # noqa: N801 (used like a function)
    """Context manager for an atomic write: yields a temporary path that is renamed to `path` on success.

    The file at `path` is complete or absent; after an exception the temporary file is deleted.

    Raises:
        InputError: `path` is a folder or cannot be written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        output_file(self.path)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            os.replace(self.temporary, self.path)
            return
        self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error


def output_folder(folder: Path) -> Path:
    """Create `folder` and return it; InputError if it is not writable."""
    folder = Path(folder)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another output folder") from error
    return folder


def output_file(path: Path) -> None:
    """Create the parent folder of `path`; InputError if it is not writable or `path` is itself a folder."""
    output_folder(path.parent)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
