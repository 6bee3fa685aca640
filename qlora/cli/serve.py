"""`qlora serve`: answer requests of OpenAI's API with a fine-tuned model, its base, and other adapters."""

import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import (
    IMPORTS,
    AnyBase,
    Device,
    OtherAdapters,
    RunOrAdapter,
    TrustRemoteCode,
    folders_by_name,
    show_device,
    startup_for,
)

if TYPE_CHECKING:
    from qlora.serving.engine import Engine
    from qlora.serving.models import Models
    from qlora.serving.start import Start
    from qlora.tracking.startup import Startup

KEY_VARIABLE = "QLORA_API_KEY"
"""environment variable with the key that each request must have"""

SPARE_CONNECTIONS = 128
"""connections beyond those whose requests are in progress or wait; they are refused, or list the models"""


def serve(
    adapter: RunOrAdapter,
    others: OtherAdapters = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. 0.0.0.0 is open to the network: set QLORA_API_KEY.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Most requests in one batch.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Most tokens of a request, prompt and answer. Default: the model's positions, at most 4096.",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, help="Most requests that wait; further ones are answered with 429.")
    ] = 64,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
) -> None:
    """Answer requests of OpenAI's API with a fine-tuned model, its base, and other adapters.

    The name of a request's model chooses: the run's name, NAME of --adapter, or base.
    Requests share batches. The memory of their cache is set before the start by --parallel and --context.
    If the variable QLORA_API_KEY is set, requests must have its value as their API key.

    [bold]qlora serve runs/quickstart --adapter poet=runs/poet[/bold]
    """
    named, key = folders_by_name(others), _key()
    startup = startup_for()
    with startup.stage(IMPORTS):
        _need_server_libraries()
        from qlora.serving.engine import Engine
        from qlora.serving.models import open_models
        from qlora.serving.server import listen
        from qlora.serving.start import choose_runner

    show_device(startup, device)
    trust = {"any_base": any_base, "trust_remote_code": trust_remote_code}
    with listen(host, port) as opened:
        with startup.stage("loading base and adapters"):
            models = open_models(adapter, named, context=context, device=device, **trust)
        with startup.stage("comparing a batch with single requests"):
            start = choose_runner(models, parallel)
        engine = Engine(start.runner, models.tokenizer, queue)
        number = _serve(models, engine, opened, host, key, startup, _facts(models, start, queue))
    totals = engine.totals
    _log(
        f"answers: {totals.answers:,}; {totals.tokens:,} tokens in {totals.seconds:.1f} s of work, "
        f"{totals.rate:,.1f} tokens/s"
    )
    if number is not None:
        sys.exit(128 + number)


def _serve(
    models: "Models",
    engine: "Engine",
    opened: socket.socket,
    host: str,
    key: str | None,
    startup: "Startup",
    facts: list[tuple[str, str]],
) -> int | None:
    """Serve until a signal comes, and return it."""
    from qlora.serving.app import build_app
    from qlora.serving.guard import LOCAL
    from qlora.serving.server import Server

    address, port = opened.getsockname()[:2]
    local = address in LOCAL
    asked = f"; requests need the key in {KEY_VARIABLE}" if key else ""
    startup.table([*facts, ("address", f"http://{f'[{host}]' if ':' in host else host}:{port}/v1{asked}")])
    if not local and key is None:
        startup.warn(f"this address is open to the network, without a key; {KEY_VARIABLE} sets one")
    app = build_app(models, engine, _log, hosts=(*LOCAL, host.lower()) if local else (), key=key)
    engine.start()
    connections = engine.runner.parallel + engine.queue + SPARE_CONNECTIONS
    return Server(app, engine, [opened], connections).serve_until_stopped()


def _key() -> str | None:
    """Return the key that requests must have; None for none. Raises UsageError for one that no header can carry."""
    from qlora.errors import UsageError

    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not all("!" <= character <= "~" for character in key):
        raise UsageError(
            f"{KEY_VARIABLE}: requests carry the key in a header, so it can have letters, digits and signs of ASCII "
            "only, without spaces; set another one"
        )
    return key


def _need_server_libraries() -> None:
    """Raise UsageError if the extra `serve` is not installed."""
    from importlib.util import find_spec

    from qlora.errors import UsageError

    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f"qlora serve needs {' and '.join(missing)}: pip install 'qlora-train[serve]'")


def _facts(models: "Models", start: "Start", queue: int) -> list[tuple[str, str]]:
    from qlora.recipe.sizes import unit_for

    unit = unit_for(start.weight_bytes + (start.cache_bytes or 0))
    cache = "the model's own" if start.cache_bytes is None else unit.text(start.cache_bytes)
    rows = [("models", ", ".join(models.served))]
    rows += [
        (f"prompt of {name}", described)
        for name, model in models.served.items()
        if (described := model.prompts.describe_system()) != "no system prompt"
    ]
    rows.append(("memory", f"weights {unit.text(start.weight_bytes)}, cache {cache}"))
    batch = f"up to {start.runner.parallel}" if start.why_single is None else f"1 ({start.why_single})"
    rows.append(("requests", f"{batch} at once, {models.context:,} tokens each; up to {queue} wait"))
    if models.not_applied:
        rows.append(("left out", f"{', '.join(models.not_applied)} of the model's generation config"))
    return rows


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
