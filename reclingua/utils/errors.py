"""InputError for invalid user input, the decorator that turns it into exit code 2, and notes."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from typing import NoReturn


class InputError(Exception):
    """Invalid user input; the message is one line that names the file or record and how to fix it."""


def one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser raise InputError for a bad flag: one line, without the usage text."""

    def error(message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    parser.error = error  # type: ignore[method-assign]
    return parser


SECRET = ("token", "key", "password", "auth")  # last words of the flags whose values are never printed
NO_SECRET = ("category_key",)
MASK = "***"


def is_secret(flag: str) -> bool:
    """Return whether the value of a flag, such as --hub_token, is a secret."""
    name = flag.lower().lstrip("-").replace("-", "_")
    return name.rpartition("_")[2] in SECRET and name not in NO_SECRET


def mask_flags(words: list[str]) -> list[str]:
    """Return a command line with *** for the values of --*_token, --*_key and the like."""
    masked = []
    for previous, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if previous.startswith("--") and is_secret(previous) and not word.startswith("--"):
            word = MASK
        elif equals and flag.startswith("--") and is_secret(flag):
            word = f"{flag}={MASK}"
        masked.append(word)
    return masked


def _secrets() -> Iterator[str]:
    """Yield the secrets on the command line of this process."""
    for word, masked in zip(sys.argv, mask_flags(sys.argv), strict=True):
        if masked != word:
            yield word if masked == MASK else word.partition("=")[2]


def print_note(message: str) -> None:
    """Print a line that is no error, by the first of several processes."""
    if not int(os.environ.get("RANK") or 0):
        print(message, flush=True)


def cli_main(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the main of a script: InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            if int(os.environ.get("RANK") or 0):
                time.sleep(10)  # all ranks fail alike: rank 0 prints first, then torchrun ends the others
            message = " ".join(str(error).split())
            for secret in filter(None, _secrets()):
                message = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, message)
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
