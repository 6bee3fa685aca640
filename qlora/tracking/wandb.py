"""Weights & Biases: a copy of the record in the browser, which never holds up or breaks a run.

All of W&B's work is done in a thread of its own, fed by a queue: neither a slow start, nor an unreachable
server, nor an error of the library reaches the training loop. Whatever goes wrong is said in one note, and
metrics.jsonl is complete without it.

Whether to go online is decided once, before `wandb.init`: an offline start after a failed online one in the
same process hangs (wandb/wandb issue 9865). Runs kept offline lie in `<run>/wandb`; `wandb sync` sends them.
"""

import netrc
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from qlora.tracking.backend import Backend, Run
from qlora.tracking.sink import Metrics, Sample, Sink, memory_totals

PROBE_SECONDS = 3.0
"""wait for a server to accept a connection before a run is kept offline"""

INIT_SECONDS = 10.0
"""wait for `wandb.init`; wandb's own default is 90"""

FINISH_SECONDS = 10.0
"""wait for uploads at the end of a run; wandb's own default is to wait for ever"""

PATIENCE_SECONDS = INIT_SECONDS + FINISH_SECONDS + 10.0
"""wait for the thread at the end of a run: more than wandb needs if it keeps the limits above"""


class Section(Protocol):
    """What is read of a recipe's `tracking.wandb`."""

    @property
    def mode(self) -> str: ...
    @property
    def project(self) -> str: ...
    @property
    def entity(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def tags(self) -> Sequence[str]: ...


class Wandb(Sink):
    """A run of W&B beside the run in the folder `run`; `note` is called with anything the user should know.

    A folder keeps its W&B id, so a resumed run goes on in the same place online.
    """

    def __init__(
        self, run: Path, config: Mapping[str, Any], section: Section, note: Callable[[str], object]
    ) -> None:
        self._run, self._config, self._section, self._note = run, config, section, note
        self._queue: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def step(self, record: Metrics) -> None:
        """The record under its own names, at its step."""
        self._send(lambda run: run.log(dict(record), step=record["step"]))

    evaluation = step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """A table `samples` with prompt, expected answer and answer."""
        rows = [[step, sample.prompt, sample.reference, sample.answer] for sample in samples]
        if rows:
            self._send(lambda run: run.log({"samples": _table(rows)}, step=step))

    def memory(self, content: Metrics, picture: Path) -> None:
        """Totals in the run's summary, and the picture."""
        totals = memory_totals(content)
        self._send(lambda run: run.summary.update(totals))
        self._send(lambda run: run.log({"memory": _image(picture)}))

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Sends what is left, for a bounded time."""
        self._send(lambda run: run.summary.update(dict(summary)))
        self._send(lambda run: run.finish(exit_code=int(failed)))
        self._send(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._note(
                f"Weights & Biases has not taken everything: `wandb sync {self._run}/wandb/run-*` sends it"
            )

    def _send(self, call: Callable[[Any], object] | None) -> None:
        """Queues a call for the thread; None ends it. Nothing is kept for a thread that has given up."""
        if self._thread.is_alive():
            self._queue.put(call)

    def _work(self) -> None:
        """The thread: start, then one queued call after the other; after an error, nothing more."""
        try:
            run = _start(self._run, self._config, self._section, self._note)
            while run is not None and (call := self._queue.get()) is not None:
                call(run)
        except ImportError:
            self._note("wandb is not installed: no Weights & Biases (pip install wandb)")
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not end the training
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self._note(f"Weights & Biases is off for this run: {reason}")


def _start(run: Path, config: Mapping[str, Any], section: Section, note: Callable[[str], object]) -> Any:
    """The started W&B run; None where it is disabled."""
    # Reports of wandb's own errors hold up the end of the process for 10 s where the server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        silent=True,
        console="off",  # the terminal belongs to the progress bar
        save_code=False,
        disable_git=True,
    )
    # Given to setup as well: the library speaks before it reads what `init` is given.
    url = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    mode = choose_mode(section.mode, url, note)
    if mode == "disabled":
        return None
    return wandb.init(
        project=section.project,
        entity=section.entity,
        name=section.name or run.resolve().name,
        tags=list(section.tags),
        id=run_id(run),
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=run,
        config=dict(config),
        reinit="create_new",  # a run that the caller has open stays what wandb.log writes to
        settings=settings,
    )


def choose_mode(
    mode: str, url: str, note: Callable[[str], object]
) -> Literal["online", "offline", "disabled"]:
    """online, offline or disabled: what the recipe's mode comes to here, for the server at `url`.

    `auto` follows WANDB_MODE, else is online where a key is configured. Online without a key (wandb would ask
    for one and wait) or without a reachable server becomes offline, with a note.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(url) else "offline")
    if mode == "disabled":
        return "disabled"
    if mode != "online":
        return "offline"
    if not _has_key(url):
        note("Weights & Biases has no API key (`wandb login` stores one): the run is kept offline")
        return "offline"
    if problem := _unreachable(url):
        note(f"Weights & Biases: {problem}: the run is kept offline; `wandb sync` sends it later")
        return "offline"
    return "online"


def _has_key(url: str) -> bool:
    """Whether a key is configured, as `wandb login` or the environment does it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in file.hosts for host in (urlsplit(url).netloc, "api.wandb.ai"))


def _unreachable(url: str) -> str | None:
    """Why no connection to the server (or the proxy before it) can be opened; None when it can."""
    target = urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy)
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        return f"{target.hostname}:{port} cannot be reached ({error.strerror or error})"
    return None


def run_id(run: Path) -> str:
    """The id at W&B of the run in a folder, made at the first call and kept in `wandb/id`."""
    file = run / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(os.urandom(4).hex())
    return file.read_text()


def _table(rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=["step", "prompt", "expected", "answer"], data=rows)


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _open(section: Section, run: Run) -> Wandb | None:
    return None if section.mode == "disabled" else Wandb(run.path, run.config, section, run.note)


BACKEND = Backend("wandb", re.compile(r"(offline-)?run-.*|latest-run|debug.*|wandb-resume\.json"), _open)
