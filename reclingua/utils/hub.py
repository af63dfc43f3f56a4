"""Models of strangers and of the hub: whether their code is run, and what is done without a network."""

from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from reclingua.utils.errors import InputError

TRUST_HELP = "run the Python code that comes with the base model; never without this flag"
_trusts_remote_code = False


def trust_remote_code(trusts: bool) -> None:
    """Set whether models loaded from now on are allowed to run Python code that comes with them (never by default)."""
    global _trusts_remote_code
    _trusts_remote_code = trusts


def hub_options(path: str | Path) -> dict[str, Any]:
    """Return the keyword arguments with which a model or tokenizer is loaded from a folder or from the hub.

    Without a network the library would try for a minute, so that a model in the hub's cache is loaded from there.

    Raises:
        InputError: `path` is neither a folder nor in the cache, and the hub cannot be reached.
    """
    options: dict[str, Any] = {"trust_remote_code": _trusts_remote_code}
    if Path(path).exists():
        return options
    try:
        validate_repo_id(str(path))
    except HFValidationError:
        raise InputError(f"{path}: no such folder, and not the name of a model on the hub") from None
    if not constants.is_offline_mode() and hub_is_reachable():
        return options
    try:
        snapshot_download(str(path), local_files_only=True)
    except OSError:
        raise InputError(
            f"{path}: no such folder, not in the cache of the hub, and {constants.ENDPOINT} cannot be reached; give a "
            "local folder, or a model that was downloaded before"
        ) from None
    return options | {"local_files_only": True}


@cache
def hub_is_reachable(patience: float = 5) -> bool:
    """Return whether the hub answers within `patience` seconds, the lookup of its name included."""
    answers = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=patience))
        except httpx2.HTTPError:
            pass

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    return bool(answers)
