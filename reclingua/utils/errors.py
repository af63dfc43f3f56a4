"""InputError for invalid user input, the decorator that turns it into exit code 2, and notes."""

import argparse
import os
import sys
import time
from collections.abc import Callable
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
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
