"""The endpoints: they turn requests into jobs of the engine, and the events of jobs into responses."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlora.errors import QloraError, first_line
from qlora.runtime.out_of_memory import is_out_of_memory
from qlora.serving import replies
from qlora.serving.api_error import ApiError
from qlora.serving.engine import Engine, QueueFull
from qlora.serving.guard import Guard, request_line
from qlora.serving.job import Event, Failed, Finished, Job, Piece, Settings, Stopping
from qlora.serving.models import Models
from qlora.serving.parameters import Wanted, parse, read, shown
from qlora.serving.replies import Reply

PATHS = MODELS, CHAT, COMPLETION = "/v1/models", "/v1/chat/completions", "/v1/completions"

BODY_BYTES = 8 * 2**20
"""longest body of a request"""

LEFT = 499
"""status in the log of a request whose client has left"""

Log = Callable[[str], object]
StatusLog = Callable[[int, str], object]


def build_app(
    models: Models, engine: Engine, log: Log, *, hosts: Sequence[str] = (), key: str | None = None
) -> Starlette:
    """Return the application.

    Args:
        models: the models to offer.
        engine: computes the answers.
        log: called with one line for each request.
        hosts: see `Guard`.
        key: see `Guard`.
    """
    endpoint = Endpoints(models, engine, log)
    return Starlette(
        routes=[
            Route(MODELS, endpoint.models, methods=["GET"]),
            Route(f"{MODELS}/{{name:path}}", endpoint.model, methods=["GET"]),
            Route(CHAT, endpoint.chat, methods=["POST"]),
            Route(COMPLETION, endpoint.completion, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, hosts=hosts, key=key, log=log)],
        exception_handlers={
            ApiError: endpoint.refuse,
            HTTPException: endpoint.refuse,
            Exception: endpoint.refuse,
        },
    )


class Exchange:
    """A job and its events, which arrive from the thread of the model."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self.job: Job

    def tell(self, event: Event) -> None:
        """Take an event from another thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended, and so have its clients
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next(self) -> Piece | Finished:
        """Return the next event. Raises ApiError if the answer failed."""
        event = await self._events.get()
        if isinstance(event, Failed):
            raise api_error(event.error)
        return event


class Endpoints:
    """The endpoints of the application; arguments as of `build_app`."""

    def __init__(self, models: Models, engine: Engine, log: Log) -> None:
        self._models, self._engine, self._log = models, engine, log
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        """List the models."""
        return JSONResponse(
            {"object": "list", "data": [self._described(name) for name in self._models.served]}
        )

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        return JSONResponse(self._described(self._models.named(request.path_params["name"]).name))

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        return await self._answer(request, chat=True)

    async def completion(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer(request, chat=False)

    async def refuse(self, request: Request, error: Exception) -> Response:
        """Respond to an error, in the shape of OpenAI's API."""
        known = api_error(error)
        self._log(f"{request_line(request.scope)} {known.status} {first_line(known)[:200]}")
        return JSONResponse(known.body, known.status, known.headers)

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "qlora"}

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        _check_type(request)
        wanted = read(parse(await _body(request)), chat=chat)
        exchange = await self._submit(wanted)
        reply = Reply(wanted.model, chat=chat, include_usage=wanted.include_usage)

        def log(status: int, text: str) -> None:
            self._log(f"{request_line(request.scope)} {status} {shown(wanted.model)}: {text}")

        if wanted.stream:
            return _Stream(_events(exchange, reply, log), _left(exchange.job, log))
        return await _whole(request, exchange, reply, log)

    async def _submit(self, wanted: Wanted) -> Exchange:
        """Put the job of a request into the queue. Raises ApiError."""
        model = self._models.named(wanted.model)
        self._engine.check_room()
        prompt = await run_in_threadpool(self._models.encode, model, wanted)
        exchange = Exchange()
        settings = Settings(
            max_tokens=wanted.max_tokens or self._models.context - len(prompt),
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            stop=wanted.stop,
            ends=self._models.ends(model),
            repetition_penalty=self._models.repetition_penalty,
        )
        continues = not wanted.messages
        exchange.job = Job(model.adapter, prompt, settings, exchange.tell, continues=continues)
        self._engine.submit(exchange.job)
        return exchange


async def _whole(request: Request, exchange: Exchange, reply: Reply, log: StatusLog) -> Response:
    """Wait for the whole answer, or for the client to leave."""
    answer = asyncio.ensure_future(_collect(exchange))
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()
            _left(exchange.job, log)()
    if not answer.done():
        return Response(status_code=LEFT)  # goes nowhere
    text, reason = answer.result()
    log(200, counts(exchange.job))
    return JSONResponse(reply.whole(text, reason, exchange.job))


async def _events(exchange: Exchange, reply: Reply, log: StatusLog) -> AsyncIterator[str]:
    """Yield the events of a stream."""
    yield reply.opening()
    try:
        while isinstance(event := await exchange.next(), Piece):
            yield reply.piece(event.text)
    except ApiError as error:
        log(error.status, first_line(error)[:200])
        yield replies.error_event(error)
    else:
        log(200, counts(exchange.job))
        yield reply.closing(event.reason, exchange.job)


def _left(job: Job, log: StatusLog) -> Callable[[], None]:
    """Return a function that frees the slot of a job whose client has left."""

    def leave() -> None:
        if not job.done:
            job.leave()
            log(LEFT, f"the client left after {len(job.tokens):,} tokens")

    return leave


class _Stream(StreamingResponse):
    """Server-sent events of a job, which is given up if they end early."""

    def __init__(self, events: AsyncIterator[str], left: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def counts(job: Job) -> str:
    """Return the tokens and the speed of an answer for the log."""
    rate = f", {len(job.tokens) / job.seconds:,.1f} tokens/s" if job.seconds else ""
    return f"{len(job.prompt):,} + {len(job.tokens):,} tokens in {job.seconds:.2f} s{rate}"


def api_error(error: Exception) -> ApiError:
    """Return any error as one of the API."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after)})
    if isinstance(error, Stopping):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, HTTPException) and error.status_code == 404:
        return ApiError(
            404, f"there is nothing at this path; the endpoints are {', '.join(PATHS)}", code="no_endpoint"
        )
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    if is_out_of_memory(error):
        return ApiError(503, "out of memory; ask for a shorter prompt", code="out_of_memory")
    if isinstance(error, QloraError):
        return ApiError(500, str(error))
    return ApiError(500, f"the model failed ({type(error).__name__}: {first_line(error)[:200]})")


def _check_type(request: Request) -> None:
    """Raise ApiError unless the body is declared as JSON: a browser sends that to its own site only, without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON; send the header Content-Type: application/json")


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES:
            raise ApiError(413, f"the body is longer than {BODY_BYTES / 2**20:.0f} MiB")
    return bytes(body)


async def _collect(exchange: Exchange) -> tuple[str, str]:
    """Return the text of an answer and the reason of its end."""
    text = ""
    while isinstance(event := await exchange.next(), Piece):
        text += event.text
    return text, event.reason


async def _gone(request: Request) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
