"""A server for tests: a real one, in a thread of this process, on a free port."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import openai
from starlette.types import ASGIApp

from qlora.serving.app import build_app
from qlora.serving.engine import Engine
from qlora.serving.guard import LOCAL
from qlora.serving.job import Job
from qlora.serving.models import Models
from qlora.serving.runners import Runner
from qlora.serving.server import Server, listen


@dataclass
class Gate:
    """A runner that waits before each round while it is closed, and notes the jobs of each round."""

    runner: Runner
    open: threading.Event = field(default_factory=threading.Event)
    rounds: list[list[Job]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parallel, self.device = self.runner.parallel, self.runner.device
        self.open.set()

    def advance(self, jobs: Sequence[Job]) -> None:
        assert self.open.wait(20)
        self.rounds.append(list(jobs))
        self.runner.advance(jobs)


@dataclass
class Running:
    """A server that runs."""

    server: Server
    engine: Engine
    gate: Gate
    url: str
    log: list[str]
    app: ASGIApp

    def client(self, **settings: Any) -> openai.OpenAI:
        """Return a client that does not try again."""
        return openai.OpenAI(
            **{"base_url": self.url, "api_key": "any", "max_retries": 0, "timeout": 20, **settings}
        )


@contextmanager
def running(models: Models, runner: Runner, *, queue: int = 8, key: str | None = None) -> Iterator[Running]:
    """Run a server, and stop it at the end."""
    log: list[str] = []
    gate = Gate(runner)
    engine = Engine(gate, models.tokenizer, queue)
    app = build_app(models, engine, log.append, hosts=LOCAL, key=key)
    with listen("127.0.0.1", 0) as opened:
        server = Server(app, engine, [opened])
        engine.start()
        thread = threading.Thread(target=server.serve_until_stopped)
        thread.start()
        url = f"http://127.0.0.1:{opened.getsockname()[1]}/v1"
        try:
            yield Running(server, engine, gate, url, log, app)
        finally:
            gate.open.set()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
