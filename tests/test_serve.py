"""`qlora serve` as OpenAI's own client sees it, against a server in this process."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from commands_for_tests import qlora
from examples_for_tests import ROOT, blocks
from runs_for_tests import finished_run
from serving_for_tests import Running, running

from benchmarks.serving import measure, serving, write_runs
from qlora.errors import UsageError
from qlora.inference.generate import answer
from qlora.inference.load import Trained, load_trained
from qlora.recipe import Recipe
from qlora.serving.guard import Guard, host_of
from qlora.serving.models import Models, open_models
from qlora.serving.parameters import BOTH, CHAT, COMPLETION
from qlora.serving.server import listen
from qlora.serving.start import choose_runner

HI = [{"role": "user", "content": "Hi"}]
LONG = {"messages": HI, "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    made = {}
    for name, seed, adapter in (("clerk", 0, {"rank": 4}), ("poet", 5, {"rank": 3, "targets": "attention"})):
        changes = [f"base.model={tiny_llama}", "base.compute_dtype=float32", f"output={place / name}"]
        made[name] = finished_run(Recipe.load("quickstart", changes), size=1.0, seed=seed, **adapter)
    (made["poet"] / "adapter" / "system_prompt.txt").write_text("You are a poet.")
    return made


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> Models:
    return open_models(str(folders["clerk"]), {"poet": str(folders["poet"])}, context=64)


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[Running]:
    with running(models, choose_runner(models, 2).runner, queue=1) as server:
        yield server


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, Trained]:
    """Each model, loaded for itself."""
    trained = {name: load_trained(folder) for name, folder in folders.items()}
    return {**trained, "base": load_trained(folders["clerk"], with_adapter=False)}


@pytest.fixture(scope="module")
def one_client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:  # takes a tenth of a second
        yield client


@pytest.fixture
def client(server: Running, one_client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    server.gate.rounds.clear()
    server.log.clear()
    yield one_client
    server.gate.open.set()
    wait_for(lambda: server.engine.load == (0, 0))


def wait_for(happens: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_adapters_by_name_answer_as_each_does_alone(
    client: openai.OpenAI, alone: dict[str, Trained], server: Running
) -> None:
    assert [model.id for model in client.models.list()] == ["clerk", "poet", "base"]
    assert client.models.retrieve("poet").owned_by == "qlora"
    question = "My lamp broke on Friday."
    seen = set()
    for name, trained in alone.items():
        ids = trained.prompts.encode(question)
        expected = answer(trained.model, trained.tokenizer, ids, 6)
        asked: Any = {"model": name, "messages": [{"role": "user", "content": question}], "temperature": 0}
        whole = client.chat.completions.create(**asked, max_tokens=6)
        assert whole.choices[0].message.content == expected
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 6)
        assert whole.choices[0].finish_reason == "length"
        *pieces, last = client.chat.completions.create(
            **asked, max_completion_tokens=6, stream=True, stream_options={"include_usage": True}
        )
        assert last.usage == whole.usage
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert [p.choices[0].finish_reason for p in pieces][-2:] == [None, "length"]
        assert len({piece.id for piece in [*pieces, last]}) == 1
        assert len(pieces) > 3
        seen.add(expected)
    assert len(seen) == 3
    wait_for(lambda: len(server.log) == 6)
    assert server.log[0].startswith("POST /v1/chat/completions 200 'clerk': ")
    assert server.log[0].endswith(" tokens/s")


def test_conversations_and_stop_sequences(client: openai.OpenAI, alone: dict[str, Trained]) -> None:
    clerk = alone["clerk"]
    before = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    ids = clerk.prompts.encode("C?", before, system="Be brief.")
    expected = answer(clerk.model, clerk.tokenizer, ids, 12)
    parts = [{"type": "text", "text": "C"}, {"type": "text", "text": "?"}]
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        *before,
        {"role": "user", "content": parts},
    ]
    asked: Any = {"model": "clerk", "messages": messages, "temperature": 0, "max_tokens": 12}
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    stop = expected[7:9]
    stopped = client.chat.completions.create(**asked, stop=stop)
    assert stopped.choices[0].message.content == expected.partition(stop)[0].rstrip()
    assert stopped.choices[0].finish_reason == "stop"
    text = "Once upon a"
    ids = clerk.prompts.encode_text(text)
    continued = client.completions.create(model="clerk", prompt=text, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in continued).strip() == answer(
        clerk.model, clerk.tokenizer, ids, 16
    )
    forged = "</s>" * 3
    counts = client.completions.create(model="clerk", prompt=forged, max_tokens=1).usage
    assert counts is not None
    assert counts.prompt_tokens > 3  # the spelling of a control token is text


def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def ask(**settings: Any) -> str | None:
        return (
            client.chat.completions.create(model="clerk", messages=HI, max_tokens=5, **settings)  # type: ignore
            .choices[0]
            .message.content
        )

    assert ask(seed=1) == ask(seed=1) != ask(seed=2)
    assert ask() != ask()  # the temperature is 1 if the request does not say


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "other\n%s"}, openai.NotFoundError, r"no model 'other\\n%s'; there are clerk, poet, base"),
        (
            {"frequency_penalty": 0.5},
            openai.BadRequestError,
            "'frequency_penalty' other than 0 is not supported",
        ),
        ({"n": 2}, openai.BadRequestError, "'n' other than 1 is not supported"),
        ({"logprobs": True}, openai.BadRequestError, "'logprobs' other than false"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "'tools' other than"),
        (
            {"response_format": {"type": "json_object"}},
            openai.BadRequestError,
            "'response_format' other than",
        ),
        ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "'top_k' is not supported here"),
        ({"temperature": 10**400}, openai.BadRequestError, "temperature must be a number from 0 to 2"),
        (
            {"messages": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *HI]},
            openai.BadRequestError,
            "begins with several system messages",
        ),
        (
            {"messages": [{"role": "user", "content": "hello " * 100_000}]},
            openai.BadRequestError,
            "has 600,000 characters",
        ),
        ({"messages": HI * 600}, openai.BadRequestError, "in 600 texts"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature must be a number from 0 to 2"),
        ({"temperature": True}, openai.BadRequestError, "temperature must be a number"),
        ({"top_p": -0.1}, openai.BadRequestError, "top_p must be a number from 0 to 1"),
        ({"seed": 2**64}, openai.BadRequestError, "seed must be a whole number, in 64 bits"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens must be a whole number, at least 1"),
        ({"max_completion_tokens": 9}, openai.BadRequestError, "max_tokens and max_completion_tokens differ"),
        ({"stop": [""]}, openai.BadRequestError, "stop must be"),
        ({"stop": list("abcde")}, openai.BadRequestError, "up to 4"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "needs stream: true"),
        ({"messages": []}, openai.BadRequestError, "at least one message"),
        ({"messages": [*HI, {"role": "assistant", "content": "A"}]}, openai.BadRequestError, "last message"),
        ({"messages": [{"role": "tool", "content": "A"}]}, openai.BadRequestError, "role must be one of"),
        ({"messages": [{**HI[0], "name": "Bob"}]}, openai.BadRequestError, "'name' is not supported"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "type text",
        ),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, openai.BadRequestError, "NUL character"),
        ({"messages": [{"role": "user", "content": "word " * 99}]}, openai.BadRequestError, "may have 64"),
        ({"max_tokens": 60}, openai.BadRequestError, r"the prompt has \d+ tokens and the answer up to 60"),
    ],
)
def test_wrong_requests_are_refused_by_name(
    client: openai.OpenAI, server: Running, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        client.chat.completions.create(**{"model": "clerk", **LONG, **changes})
    assert isinstance(refused.value, openai.APIStatusError)
    assert refused.value.body.keys() == {"message", "type", "param", "code"}  # type: ignore[attr-defined]
    assert len(server.log) == 1
    assert server.log[0].isprintable()


def test_values_that_ask_for_nothing_are_accepted(client: openai.OpenAI) -> None:
    nothing: Any = {
        "n": 1, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": [], "user": "me", "stop": None,
        "response_format": {"type": "text"}, "store": False,
    }  # fmt: skip
    done = client.chat.completions.create(model="clerk", messages=HI, max_tokens=1, **nothing)  # type: ignore
    assert done.usage is not None
    assert done.usage.completion_tokens == 1


def test_bodies_and_addresses_that_are_no_requests(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    json_type = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url) as http:

        def post(
            body: bytes, headers: dict[str, str] = json_type, to: str = "/completions"
        ) -> tuple[int, str]:
            response = http.post(to, content=body, headers=headers)
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
            return response.status_code, response.json()["error"]["message"]

        assert post(b"{") == (400, "the body is not valid JSON (Expecting property name enclosed in double quotes: "
                                   "line 1 column 2 (char 1))")  # fmt: skip
        for body in (b"[]", b'"a"', b"\xff", b"[" * 100_000, b'{"temperature": NaN}', b"{}"):
            assert post(body)[0] == 400
        assert post(b'{"model": "clerk", "prompt": "a", "\\ud800": 1}')[0] == 400
        half = b'{"model": "clerk", "prompt": "\\ud800"}'
        assert post(half) == (
            400,
            "broken Unicode: the prompt contains half a character (a lone surrogate); remove it",
        )
        assert post(b"{}", {"content-type": "text/plain"})[0] == 415
        assert post(b"{}", {**json_type, "host": "evil.example:80"})[0] == 403
        assert server.log[-1].startswith("POST /v1/completions 403 the Host header is not a name")
        assert post(b"{}", to="/nowhere%0A%25")[1].endswith(
            "/v1/models, /v1/chat/completions, /v1/completions"
        )
        assert server.log[-1].startswith("POST '/v1/nowhere\\n%' 404 ")
        assert http.get("/completions").status_code == 405
        monkeypatch.setattr("qlora.serving.app.BODY_BYTES", 100)
        assert post(b" " * 101) == (413, "the body is longer than 0 MiB")
        assert (
            "access-control-allow-origin" not in http.get("/models", headers={"origin": "http://a"}).headers
        )


def test_the_page_about_serving(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """Its client runs, and it names all parameters."""
    page = ROOT / "docs/guides/serving.md"
    (program,) = [block.text for block in blocks(page) if block.language == "python"]
    for shown, here in {
        "http://127.0.0.1:8000/v1": server.url,
        "quickstart": "clerk",
        "second": "poet",
    }.items():
        assert shown in program
        program = program.replace(shown, here)
    exec(compile(program, str(page), "exec"))
    printed = capsys.readouterr().out
    assert printed.startswith("['clerk', 'poet', 'base']\n")
    assert "CompletionUsage(completion_tokens=" in printed
    text = page.read_text()
    assert not [
        name for name in BOTH | CHAT | COMPLETION if f"`{name}`" not in text and f"`{name}." not in text
    ]


def test_a_full_queue_says_when_to_come_again(client: openai.OpenAI, server: Running) -> None:
    server.gate.open.clear()
    threads = [
        threading.Thread(
            target=client.chat.completions.create, kwargs={"model": "clerk", **LONG, "max_tokens": 2}
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: sum(server.engine.load) == 3)  # two in progress, one waiting
    with pytest.raises(openai.RateLimitError, match="the queue is full") as full:
        client.chat.completions.create(model="poet", **LONG)  # type: ignore[call-overload]
    assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
    server.gate.open.set()
    for thread in threads:
        thread.join(20)
    assert client.chat.completions.create(model="poet", messages=HI, max_tokens=1).choices  # type: ignore


def test_a_client_that_leaves_frees_its_slot_within_a_token(client: openai.OpenAI, server: Running) -> None:
    stream = client.chat.completions.create(model="clerk", **LONG, stream=True)  # type: ignore[call-overload]
    next(stream)
    wait_for(lambda: server.gate.rounds)
    server.gate.open.clear()
    (job,) = server.gate.rounds[-1]
    stream.close()
    wait_for(lambda: job.left)
    before = len(job.tokens)
    server.gate.open.set()
    wait_for(lambda: server.engine.load == (0, 0))
    assert before < 40 - 2
    assert len(job.tokens) <= before + 1
    assert "499 'clerk': the client left after" in server.log[-1]
    server.gate.open.clear()
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).chat.completions.create(model="clerk", **LONG)  # type: ignore
    wait_for(lambda: len(server.log) == 2)
    server.gate.open.set()
    wait_for(lambda: server.engine.load == (0, 0))
    assert "499 'clerk': the client left after" in server.log[-1]


def test_a_failing_model_does_not_end_the_server(
    client: openai.OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel for this")

    with monkeypatch.context() as patch:
        patch.setattr(server.gate.runner.model, "forward", broken)  # type: ignore[attr-defined]
        with pytest.raises(openai.InternalServerError, match="RuntimeError: no kernel for this"):
            client.chat.completions.create(model="clerk", **LONG)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="no kernel for this"):
            list(client.chat.completions.create(model="clerk", **LONG, stream=True))  # type: ignore
        patch.setattr(server.gate.runner, "advance", broken)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="clerk", **LONG)  # type: ignore[call-overload]
    assert client.chat.completions.create(model="clerk", messages=HI, max_tokens=1).choices  # type: ignore


def test_a_key_is_needed_if_there_is_one(server: Running) -> None:
    calls = []

    async def app(*_: object) -> None:
        calls.append(True)

    async def sent(message: Any) -> None:
        answers.append(message.get("status"))

    log: list[str] = []
    guard = Guard(app, (), "sécret", log.append)
    answers: list[Any] = []
    for header in (None, "Bearer wrong", "Basic sécret", "Bearer sécret"):
        headers = [] if header is None else [(b"authorization", header.encode("latin-1"))]
        scope = {"type": "http", "method": "GET", "path": "/v1\x1b", "headers": headers}
        coroutine = guard(scope, None, sent)  # type: ignore[arg-type]
        with pytest.raises(StopIteration):
            coroutine.send(None)
    assert [status for status in answers if status] == [401] * 3
    assert len(calls) == 1
    assert [line.partition(" the ")[0] for line in log] == ["GET '/v1\\x1b' 401"] * 3
    assert host_of("[::1]:80") == "::1"


def test_a_server_that_ends_ends_its_streams(models: Models) -> None:
    with running(models, choose_runner(models, 1).runner) as server, server.client() as client:
        stream = client.chat.completions.create(model="clerk", **LONG, stream=True)  # type: ignore
        next(stream)
        waiting = threading.Thread(target=lambda: refused.append(_error(client)))
        refused: list[Exception] = []
        server.gate.open.clear()
        waiting.start()
        wait_for(lambda: sum(server.engine.load) == 2)
        server.server.should_exit = True
        wait_for(lambda: server.engine._stopping)
        server.gate.open.set()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        waiting.join(20)
        assert isinstance(refused[0], openai.InternalServerError)
        assert refused[0].status_code == 503


def _error(client: openai.OpenAI) -> Exception:
    with pytest.raises(openai.APIError) as error:
        client.chat.completions.create(model="clerk", **LONG)  # type: ignore[call-overload]
    return error.value


@pytest.mark.parametrize("key", ["schlüssel", " key", "two words", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("QLORA_API_KEY", key)
    done = qlora("serve", "no/run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "qlora: QLORA_API_KEY: requests carry the key in a header, so it can have letters, digits and signs of ASCII "
        "only, without spaces; set another one\n"
    )


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal(
    folders: dict[str, Path], number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_API_KEY", "secret")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, said = f"http://127.0.0.1:{port}/v1", []

    def ask() -> None:
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}) as http:

            def answers() -> bool:
                try:
                    said.append(http.get("/models").json())
                except httpx.TransportError:
                    return False
                return True

            wait_for(answers)
            body = {"model": "poet", "prompt": "Hi", "max_tokens": 3}
            said.append(http.post("/completions", json=body).json())
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    adapter = f"poet={folders['poet']}"
    done = qlora(
        "serve", folders["clerk"], "--adapter", adapter, "--port", port, "--context", 32, "--parallel", 3
    )
    asking.join(20)
    assert done.returncode == code
    assert [model["id"] for model in said[0]["data"]] == ["clerk", "poet", "base"]
    assert said[1]["usage"]["completion_tokens"] == 3
    assert done.stdout == ""
    for line in (
        "models          clerk, poet, base",
        "prompt of poet  system prompt: You are a poet. (that of all training rows)",
        " MiB, cache 0.0469 MiB\n",  # 3 x 32 tokens of 512 bytes
        "requests        up to 3 at once, 32 tokens each; up to 64 wait",
        f"address         {url}; requests need the key in QLORA_API_KEY",
        "answers: 1; 3 tokens in ",
    ):
        assert line in done.stderr
    assert json.dumps("secret") not in done.stderr


def test_what_keeps_the_command_from_starting(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = qlora("serve", folders["clerk"], "--port", port)
        assert done.returncode == 2
        assert f"qlora: --port {port}: another program listens there; choose another port" in done.stderr
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        done = qlora("serve", folders["clerk"])
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        "qlora: qlora serve needs starlette and uvicorn: pip install 'qlora-train[serve]'",
    )
    with pytest.raises(UsageError, match="cannot listen there"):
        listen("203.0.113.1", 8000)  # an address for documentation, of no machine


@pytest.mark.slow
def test_eight_clients_get_three_times_the_tokens_of_one(tmp_path: Path) -> None:
    """The best of three rounds each, because other programs of the machine slow some down."""
    runs = write_runs(tmp_path, "bundled", layers=4, dtype="float32")
    with serving(runs, parallel=8) as (url, process, _):
        rounds = [
            (measure(url, process, ["one"], 32), measure(url, process, ["one"] * 8, 32)) for _ in range(3)
        ]
    one, eight = (max(each.tokens_per_s for each in found) for found in zip(*rounds, strict=True))
    assert eight > 3 * one
    memory = [each.memory_bytes for pair in rounds for each in pair]
    assert memory[-1] - memory[1] < 2**24
