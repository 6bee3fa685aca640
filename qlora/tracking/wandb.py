"""Weights & Biases: a copy of the record on a server, which never delays or breaks a run.

A separate thread makes all calls to W&B and receives them through a queue. A slow start, an unreachable server or an
error of the library therefore never reaches the training loop. An error is shown as one note, and metrics.jsonl is
complete without W&B.

Online or offline is decided before `wandb.init`. If a server refuses an online start or does not answer it, the run is
kept offline too. Between the two starts, wandb's helper process is ended: an offline start in the helper process of a
failed online one hangs (wandb/wandb issue 9865). Runs kept offline are in `<run>/wandb`; `wandb sync` uploads them.
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

from qlora.errors import first_line
from qlora.storage import atomic, regular_file
from qlora.tracking.backend import Backend, Run
from qlora.tracking.sink import Metrics, Sample, Sink, memory_totals

PROBE_SECONDS = 3.0
"""time for the server to accept a connection; after that, the run is kept offline"""

INIT_SECONDS = 10.0
"""time limit of `wandb.init`; wandb's default is 90"""

FINISH_SECONDS = 10.0
"""time limit of uploads at the end of a run; wandb's default is no limit"""

PATIENCE_SECONDS = 2 * INIT_SECONDS + FINISH_SECONDS + 10.0
"""time limit of the thread at the end of a run, longer than two starts and the uploads together"""

NAME_LIMIT = 128
"""most characters of the name of a run or a project"""


class Section(Protocol):
    """Settings read from a recipe's `tracking.wandb`."""

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
    """Copy of the run in folder `run` at W&B. `note` is called with messages for the user.

    The folder stores the W&B id, so a resumed run continues the same run at W&B.
    """

    def __init__(
        self, run: Path, config: Mapping[str, Any], section: Section, note: Callable[[str], object]
    ) -> None:
        self._run, self._config, self._section, self._note = run, config, section, note
        self._queue: SimpleQueue[Callable[[Any], object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def step(self, record: Metrics) -> None:
        """Log each number of the record under its name, at the record's step."""
        self._send(lambda run: run.log(dict(record), step=record["step"]))

    evaluation = step

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Log a table `samples` with the conversation before the prompt, prompt, expected answer and answer."""
        rows = [[step, sample.before, sample.prompt, sample.reference, sample.answer] for sample in samples]
        if rows:
            self._send(lambda run: run.log({"samples": _table(rows)}, step=step))

    def memory(self, content: Metrics, picture: Path) -> None:
        """Add the memory totals to the run's summary, and log the picture."""
        totals = memory_totals(content)
        self._send(lambda run: run.summary.update(totals))
        self._send(lambda run: run.log({"memory": _image(picture)}))

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Upload the rest within PATIENCE_SECONDS, and show a note if that fails."""
        self._send(lambda run: run.summary.update(dict(summary)))
        self._send(lambda run: run.finish(exit_code=int(failed)))
        self._send(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._note(
                f"the upload to Weights & Biases is incomplete; run `wandb sync {self._run}/wandb/run-*` to finish it"
            )

    def _send(self, call: Callable[[Any], object] | None) -> None:
        """Queue a call for the thread; None ends the thread. After the thread has ended, calls are dropped."""
        if self._thread.is_alive():
            self._queue.put(call)

    def _work(self) -> None:
        """Start W&B, then run the queued calls in order. An error ends the thread."""
        try:
            run = _start(self._run, self._config, self._section, self._note)
            while run is not None and (call := self._queue.get()) is not None:
                call(run)
        except ImportError:
            self._note("wandb is not installed, so nothing goes to Weights & Biases; run `pip install wandb`")
        except Exception as error:  # noqa: BLE001 - an error of a tracker must not end the training
            reason = reason_of(error)
            self._note(f"Weights & Biases is off for this run: {reason}")


def reason_of(error: Exception) -> str:
    """Return what is wrong: the settings that pydantic refuses with its messages, or an error's first line."""
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return first_line(error)
    return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in errors())


def _start(run: Path, config: Mapping[str, Any], section: Section, note: Callable[[str], object]) -> Any:
    """Start the run at W&B and return it; None if W&B is disabled."""
    # wandb's error reporting delays the end of the process by 10 s if its server does not answer.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        silent=True,
        console="off",  # the progress bar uses the terminal
        save_code=False,
        disable_git=True,
    )
    # Also passed to setup: the library prints before it reads the settings passed to `init`.
    url = wandb.setup(settings=wandb.Settings(silent=True)).settings.base_url
    mode = choose_mode(section.mode, url, note)
    if mode == "disabled":
        return None

    def init(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=section.project,
            entity=section.entity,
            name=run_name(section, run),
            tags=list(section.tags),
            id=run_id(run),
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=run,
            config=dict(config),
            reinit="create_new",  # wandb.log keeps writing to a run that the caller has open
            settings=settings,
        )

    try:
        return init(mode)
    except Exception as error:
        if mode == "offline" or wandb.run is not None:  # the caller's open run needs the helper process
            raise
        note(
            f"Weights & Biases: {first_line(error)}, so the run is kept offline; upload it with `wandb sync`"
        )
    wandb.teardown()
    return init("offline")


def choose_mode(
    mode: str, url: str, note: Callable[[str], object]
) -> Literal["online", "offline", "disabled"]:
    """Return the mode to use with the server at `url`: online, offline or disabled.

    `auto` follows WANDB_MODE; without it, `auto` is online if an API key is configured, else offline. `online` becomes
    offline, with a note, if the server cannot be reached or there is no key (wandb would prompt for one and wait).
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(url) else "offline")
    if mode == "disabled":
        return "disabled"
    if mode != "online":
        return "offline"
    if not _has_key(url):
        note("Weights & Biases: no API key, so the run is kept offline; run `wandb login` to store a key")
        return "offline"
    if problem := _unreachable(url):
        note(f"Weights & Biases: {problem}, so the run is kept offline; upload it later with `wandb sync`")
        return "offline"
    return "online"


def login() -> str:
    """Return whether runs of this machine go online, in words and without the key. Contacts no server."""
    if mode := os.environ.get("WANDB_MODE"):
        return f"{mode}, by WANDB_MODE"
    if _has_key(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"):
        return "an API key is configured: runs are online"
    return "no API key: runs are kept offline; `wandb login` stores a key"


def _has_key(url: str) -> bool:
    """Return True if an API key is configured, by `wandb login` or by the environment."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in file.hosts for host in (urlsplit(url).netloc, "api.wandb.ai"))


def _unreachable(url: str) -> str | None:
    """Return the reason why the server (or the proxy in front of it) accepts no connection; None if it does."""
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


def run_name(section: Section, run: Path) -> str:
    """Return the name of the run at W&B: its own, or the beginning of that of its folder."""
    return section.name or run.resolve().name[:NAME_LIMIT]


def run_id(run: Path) -> str:
    """Return the W&B id of the run in a folder. The first call makes the id and stores it in `wandb/id`.

    Under an agent of a sweep it is the id that the sweep gave, which W&B takes anyway; a later resume finds that run.
    """
    file = run / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        atomic.write(file, (given or os.urandom(4).hex()).encode())
    return regular_file.read_text(file)


def _table(rows: list[list[Any]]) -> Any:
    import wandb

    return wandb.Table(columns=["step", "before", "prompt", "expected", "answer"], data=rows)


def _image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


def _open(section: Section, run: Run) -> Wandb | None:
    return None if section.mode == "disabled" else Wandb(run.path, run.config, section, run.note)


BACKEND = Backend("wandb", re.compile(r"(offline-)?run-.*|latest-run|debug.*|wandb-resume\.json"), _open)
