"""File helpers: validated JSON, YAML, atomic writes, checks of output paths, locks."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

import yaml
from safetensors import SafetensorError

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

    The file at `path` is complete or absent, also after a power failure; after an exception the temporary file is
    deleted.

    Raises:
        InputError: `path` is a folder or cannot be written.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.temporary = temporary_path(self.path)

    def __enter__(self) -> Path:
        output_file(self.path)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                sync(self.temporary)
                os.replace(self.temporary, self.path)
        except OSError as failure:
            error = failure
        if error is not None:
            self.temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{self.path}: cannot be written ({error.strerror or error})") from error


@contextmanager
def atomic_files(folder: Path, names: Iterable[str]) -> Iterator[dict[str, Path]]:
    """Write files that belong together: yields name -> temporary path; at the end all of them are replaced, or none.

    After an error the earlier files are in place. While files are replaced, the folder holds REPLACING, by which
    `check_complete` recognises that a process was killed in between.

    Raises:
        InputError: `folder` cannot be written.
    """
    folder, names = output_folder(folder), list(names)
    for name in names:
        output_file(folder / name)
    staging_dir = temporary_path(folder / "files")
    try:
        (staging_dir / "before").mkdir(parents=True)
        yield {name: staging_dir / name for name in names}
        for name in names:
            sync(staging_dir / name)
        _replace_files(folder, staging_dir, names)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path, replaces: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` on success, and deleted after an exception.

    Args:
        replaces: files in `path` of the same names are replaced, the record (run.json) last; others stay.

    Raises:
        InputError: `path` exists and is not empty, unless it `replaces`, or cannot be written.
    """
    path = Path(path).absolute()
    if path.is_dir() and any(path.iterdir()) and not replaces:
        raise InputError(f"{path}: exists and is not empty; choose another output folder")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; choose another output folder")
    path = path.resolve()
    temporary = temporary_path(path)
    output_folder(path.parent)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        if path.is_dir():
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == "run.json"):
                file.replace(path / file.name)
        else:
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # does not exist after success


REPLACING = ".replacing"  # in a folder some of whose files are of the preparation before


def _replace_files(folder: Path, staging_dir: Path, names: list[str]) -> None:
    """Rename all files to their names in `folder`; after an exception those renamed so far are restored."""
    marker, replaced = folder / REPLACING, []
    was_complete = not marker.exists()
    try:
        marker.touch()
        sync(folder)
        for name in names:
            if (folder / name).exists():
                _link_or_copy(folder / name, staging_dir / "before" / name)
            replaced.append(name)
            os.replace(staging_dir / name, folder / name)
    except BaseException:
        for name in replaced:
            if (staging_dir / name).exists():
                continue  # the one that could not be renamed
            if (staging_dir / "before" / name).exists():
                os.replace(staging_dir / "before" / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        if was_complete:
            marker.unlink(missing_ok=True)
        raise
    marker.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)


def check_complete(folder: Path) -> None:
    """Raise InputError if the files of a dataset folder are of two preparations, see `atomic_files`."""
    if (Path(folder) / REPLACING).exists():
        raise InputError(f"{folder}: data.prepare was killed while it replaced the files there; run it again")


def temporary_path(path: Path) -> Path:
    """Return a hidden path beside `path` that no other process, on this machine or another, takes."""
    return path.with_name(f".{path.name}.{token_hex(8)}.tmp")


def sync(path: Path) -> None:
    """Write a file, or what a folder lists, to the disk, so that a rename afterwards cannot outrun its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def output_folder(folder: Path) -> Path:
    """Create `folder` and return it; InputError if it is not writable."""
    folder = Path(folder)
    probe = temporary_path(folder / "write-test")
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


def check_outputs(outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None] | None = None) -> None:
    """Raise InputError if one of the files that a command writes is another of them, or one that it reads.

    Args:
        outputs, inputs: flag -> path; None where the flag is not given. Inputs can share a path.
    """
    flags: dict[Path, str] = {path.resolve(): flag for flag, path in (inputs or {}).items() if path is not None}
    for flag, path in outputs.items():
        if path is None:
            continue
        if (other := flags.setdefault(path.resolve(), flag)) != flag:
            raise InputError(f"{path}: is both {other} and {flag}; name two files")


@contextmanager
def locked_folder(folder: Path, patience: float = 10) -> Iterator[None]:
    """Create an output folder and hold its lock, so that two runs cannot write into it at once.

    A folder that did not exist before and is still empty at the end is deleted.

    Args:
        patience: seconds to wait for a run that is just ending.

    Raises:
        InputError: the folder cannot be written, or another process holds the lock.
    """
    is_new = not folder.exists()
    descriptor, started = os.open(output_folder(folder), os.O_RDONLY), time.monotonic()
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - started > patience:
                    raise InputError(
                        f"{folder}: another run is writing there; wait for it, or choose another output folder"
                    ) from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
