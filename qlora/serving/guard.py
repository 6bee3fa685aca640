"""Admission of requests: those to a name of this server, and with its key if it has one."""

import hmac
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from qlora.serving.api_error import ApiError
from qlora.serving.parameters import shown

LOCAL = ("localhost", "127.0.0.1", "::1")
"""names of this machine for itself"""


class Guard:
    """Refuses requests before the application sees them.

    A web page can make a name of its own point to 127.0.0.1 and so reach a local server from a visitor's browser (DNS
    rebinding). Its requests carry that name as their Host, which is not one of `hosts`.

    Args:
        app: the application.
        hosts: names under which the server may be reached; empty for any.
        key: key that each request must have; None for none.
        log: called with one line for each request that is refused.
    """

    def __init__(
        self, app: ASGIApp, hosts: Sequence[str], key: str | None, log: Callable[[str], object]
    ) -> None:
        self._app, self._hosts, self._key, self._log = app, frozenset(hosts), key, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with an error."""
        if scope["type"] != "http":  # neither a websocket nor a lifespan is offered
            return
        try:
            self._check(Headers(scope=scope))
        except ApiError as error:
            self._log(f"{request_line(scope)} {error.status} {error}")
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers) -> None:
        if self._hosts and host_of(headers.get("host", "")) not in self._hosts:
            raise ApiError(
                403,
                "the Host header is not a name of this server; ask it at the address that it printed",
                code="host",
            )
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def host_of(header: str) -> str:
    """Return the name in a Host header, in lower case and without the port.

    Examples:
        >>> host_of("Localhost:8000"), host_of("[::1]:8000")
        ('localhost', '::1')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


def request_line(scope: Scope) -> str:
    """Return method and path of a request for the log, in printable characters."""
    path = scope["path"]
    plain = path.isascii() and path.isprintable() and len(path) < 60
    return f"{scope['method'][:10]} {path if plain else shown(path)}"
