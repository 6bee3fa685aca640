"""The HTTP server: its socket, its signals, and its end."""

import errno
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from qlora.errors import UsageError
from qlora.runtime.signals import SIGNALS, not_ignored
from qlora.serving.engine import Engine

SECONDS_TO_END = 10
"""longest wait for clients that do not read the end of their streams"""


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server; port 0 takes a free one.

    Raises:
        UsageError: the address is not one of this machine, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port {port}: another program listens there; choose another port") from None
        raise UsageError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); choose an address of this "
            "machine and a port above 1023"
        ) from None


class Server(uvicorn.Server):
    """Serves an application until a signal comes. Then its streams end with an error event, and so do its clients.

    Args:
        app: the application.
        engine: computes the answers; it has been started.
        opened: sockets from `listen`.
        most_connections: connections above this number are answered with 503.

    Examples:
        >>> with listen("127.0.0.1", 8000) as opened:
        ...     Server(app, engine, [opened]).serve_until_stopped()
    """

    def __init__(
        self, app: ASGIApp, engine: Engine, opened: Sequence[socket.socket], most_connections: int = 256
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=most_connections,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )
        self._engine, self._opened = engine, list(opened)
        self.signal_number: int | None = None
        """signal that ended the server"""

    def serve_until_stopped(self) -> int | None:
        """Serve until a signal comes or `should_exit` is set, and wait for the engine's end. Return the signal."""
        try:
            self.run(sockets=self._opened)
        finally:
            self._engine.stop()
        self._engine.join()
        return self.signal_number

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the answers in progress, then the connections."""
        self._engine.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals that end a command of qlora; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [n for n in not_ignored(SIGNALS) if signal.getsignal(n) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ask for the end; a second Ctrl-C does not wait for clients."""
        if self.signal_number is None:
            self.signal_number = sig
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
