"""Which requests a server on this machine answers: those addressed to it by its own name, from its own pages.

A browser lets any web page send requests to 127.0.0.1, and read the answers of a server that takes the name of that
page for its own (DNS rebinding). The Host header states the name in the address bar, Origin the page that asks.
"""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from reclingua.utils.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost")
API_KEYS, ADMIN_KEY = "RECLINGUA_API_KEYS", "RECLINGUA_ADMIN_KEY"  # of serve.py, in the environment


class HostCheck:
    """ASGI middleware that answers 403 to requests for another host, or from a page of another origin.

    hosts: names without a port under which the page is reached.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]):
        self.app, self.hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (reason := self.refusal(Headers(scope=scope))):
            await PlainTextResponse(f"{reason}; see --allowed_hosts\n", status_code=403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def refusal(self, headers: Headers) -> str:
        """Return why a request with these headers is refused, or ""."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or _host_of(hosts[0]) not in self.hosts:
            return "this host is not allowed"
        for origin in headers.getlist("origin"):
            scheme, _, address = origin.partition("://")
            # Another port of the same machine is another origin, unless its name was allowed by the user.
            is_own = address == hosts[0] or _host_of(address) in self.hosts - {*LOOPBACK}
            if scheme not in ("http", "https") or not is_own:
                return "pages of this origin are not allowed"
        return ""


def _host_of(address: str) -> str:
    """Return the lower-case name of `name` or `name:port`, "" if it is neither."""
    try:
        parts = urlsplit(f"//{address}")
        return (parts.hostname or "") if parts.netloc == address and "@" not in address else ""
    except ValueError:
        return ""


def check_hosts(hosts: Iterable[str]) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    """Return the lifespan of an app that refuses requests to other hosts.

    The check has to be outside the middleware that Gradio adds, which sends CORS headers.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        assert app.middleware_stack is not None  # the app has started
        app.middleware_stack = HostCheck(app.middleware_stack, hosts)
        yield

    return lifespan


def parse_auth(value: str) -> tuple[str, str]:
    """Return (user, password) of --auth, which is USER:PASSWORD or the path of a file that holds that line."""
    if Path(value).is_file():
        try:
            value = Path(value).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise InputError("--auth: the file cannot be read") from None
    user, _, password = value.partition(":")
    if not user or not password or "\n" in value:
        raise InputError("--auth should be USER:PASSWORD, or a file that holds such a line")
    return user, password
