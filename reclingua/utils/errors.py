"""Bad input: one exception for it, and the one way in which every script reports it."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import NoReturn


class InputError(Exception):
    """The user's input is wrong; the message is one line that names the file or record and says what to do."""


def one_line_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make a parser report a bad flag as every other bad input: one line, without the usage."""

    def error(message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")

    parser.error = error
    return parser


def cli_main(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a script's main: an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""

    @wraps(main)
    def run(*args, **kwargs) -> None:
        try:
            main(*args, **kwargs)
        except InputError as error:
            if int(os.environ.get("RANK") or 0):
                time.sleep(3)  # of processes that found the same, torchrun lets only the first say it
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return run
