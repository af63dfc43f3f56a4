"""API keys from the environment, and the time that a client has to send its request."""

import asyncio
import hmac
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reclingua.utils.access import ADMIN_KEY, API_KEYS
from reclingua.utils.errors import InputError

MIN_KEY_LENGTH = 16  # characters

Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


@dataclass(frozen=True)
class Keys:
    """Keys that clients send as `Authorization: Bearer KEY`.

    Args:
        api: of requests for answers; empty: everybody is answered.
        admin: of reloads; None: nobody can ask for one.
    """

    api: tuple[str, ...] = ()
    admin: str | None = None

    @classmethod
    def from_environment(cls) -> "Keys":
        """Read the keys, those of the API separated by commas; InputError for one that can be guessed or sent by none.

        The message does not contain the key.
        """
        api = tuple(key.strip() for key in os.environ.get(API_KEYS, "").split(",") if key.strip())
        admin = os.environ.get(ADMIN_KEY, "").strip() or None
        for name, key in [*((API_KEYS, key) for key in api), *([(ADMIN_KEY, admin)] if admin else [])]:
            if len(key) < MIN_KEY_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
                raise InputError(f"{name}: a key should have {MIN_KEY_LENGTH} ASCII letters or digits at least")
        return cls(api, admin)

    def check_api(self, credentials: Credentials) -> None:
        """Raise HTTPException 401 unless the request has one of the API keys, or there are none."""
        if self.api:
            _check(credentials, self.api)

    def check_admin(self, credentials: Credentials) -> None:
        """Raise HTTPException 403 if there is no admin key, 401 unless the request has it."""
        if self.admin is None:
            raise HTTPException(403, f"the server was started without {ADMIN_KEY}")
        _check(credentials, [self.admin])


def _check(credentials: HTTPAuthorizationCredentials | None, keys: Collection[str]) -> None:
    sent = credentials.credentials.encode() if credentials else b""
    if not any([hmac.compare_digest(sent, key.encode()) for key in keys]):  # all of them, so that no time tells which
        raise HTTPException(401, "the key is missing or wrong", {"WWW-Authenticate": "Bearer"})


class BodyDeadline:
    """ASGI middleware that answers 408 to a client that takes more than `seconds` to send the body of a request."""

    def __init__(self, app: ASGIApp, seconds: float):
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, self._limited(receive) if scope["type"] == "http" else receive, send)

    def _limited(self, receive: Receive) -> Callable:
        is_whole, deadline = False, asyncio.get_running_loop().time() + self.seconds

        async def receive_in_time() -> Message:
            nonlocal is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = "the body of the request did not arrive in time"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            is_whole = not message.get("more_body", False)
            return message

        return receive_in_time
