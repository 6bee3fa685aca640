"""The folder for the hub and its upload, to a small server that answers as the hub does."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands_for_tests import qlora
from huggingface_hub import constants
from runs_for_tests import finished_run
from safetensors.torch import load_file

from qlora.inference.load import load_trained
from qlora.recipe import Recipe
from qlora.report.facts import (
    BaseFacts,
    DataFacts,
    DeviceFacts,
    MemoryFacts,
    RunFacts,
    SessionFacts,
    StepFacts,
)
from qlora.report.model_card import CardSettings, Clean, shared_recipe, write_card

RecipeFile = Callable[..., Path]


class Hub(ThreadingHTTPServer):
    """The calls of the hub's API that an upload makes; files arrive inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Calls)
        self.repos: dict[str, bool] = {}
        """whether each repository is private"""
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.refuses: str | None = None


class _Calls(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self.server.calls.append(f"GET {self.path}")
        name = self.path.removeprefix("/api/models/").split("/revision")[0].split("?")[0]
        self._answer(
            {"id": name, "private": self.server.repos[name], "sha": "0" * 40, "siblings": [], "tags": []}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(f"POST {self.path}")
        if self.server.refuses and self.server.refuses in self.path:
            self._answer({"error": "You have no rights here"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in self.server.repos
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repos.setdefault(name, bool(private))
            self._answer({"url": f"{constants.ENDPOINT}/{name}"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer(
                {"commitOid": "1" * 40, "commitUrl": f"{constants.ENDPOINT}/me/a/commit/1", "hookOutput": ""}
            )
        else:
            self._answer({"warnings": [], "errors": []})

    def _answer(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def recipe(recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Return a recipe for a local base and local rows, with a W&B account."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret-customers").mkdir()
    rows = tmp_path / "secret-customers" / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "PRIVATE ROW"}, {"role": "assistant", "content": "yes"}]}
    rows.write_text((json.dumps(row) + "\n") * 8)
    tracking = {"wandb": {"mode": "offline", "entity": "my-account"}}
    base = {"compute_dtype": "float32"}
    data = {"source": str(rows), "limit": None, "held_out": 2}
    return Recipe.load(
        recipe_file(base=base, data=data, tracking=tracking, training={"max_steps": 2, "samples": 1})
    )


def facts(recipe: Recipe) -> dict[str, Any]:
    """Return facts that name paths of this machine and quote a row."""
    source = recipe.data.source_name
    counts = {"read": 8, "split": 0, "bad": 0, "dropped": 0, "truncated": 0, "unsupervised": 0, "train": 6}
    counts |= {"held_out": 2, "tokens": 90, "supervised": 45, "packing_efficiency": None}
    return RunFacts(
        DeviceFacts("cpu", "CPU", 2**30, 2**30, 1),
        BaseFacts(recipe.base.model, None, "pretrained", 1000, "NF4", "float32", "", "LoRA of rank 4", 10),
        DataFacts(
            source,
            "messages",
            None,
            128,
            False,
            {**counts, "reasons": {}, "sources": []},
            ["as in PRIVATE ROW"],
        ),
        StepFacts(4, 2, 2, 2, 2, 0, None, "adamw", 1e-3, "constant", 0),
        MemoryFacts(None, "not forecast"),
        recipe.output,
        [f"rows in {source}"],
        SessionFacts("2026-11-30", f"qlora train {source}", {"qlora": "1"}, HARDWARE, {}),
    ).as_json()


HARDWARE = {"cpu": "CPU", "cores": 2, "memory_bytes": 2**30, "gpus": [], "system": "Linux"}


@pytest.fixture
def run(recipe: Recipe) -> Path:
    """Return the folder of a finished run."""
    run = finished_run(recipe)
    (run / "run.json").write_text("{}")
    speed = {"tokens_per_second": 9.0, "tokens": 9, "supervised_tokens": 4}
    steps = [{"step": i, "loss": 3.0 - i, "lr": 1e-3, "grad_norm": 1.0, **speed} for i in (1, 2)]
    sample = {"prompt": "PRIVATE ROW", "reference": "yes", "answer": "no"}
    evaluations = [{"step": 0, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.5, "samples": [sample]}]
    records = [evaluations[0], *steps, evaluations[1]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    memory = {"allocated_bytes": None, "resident_bytes": 2**30}
    result = {"total_steps": 2, "seconds": 3.0, "loss_after": 1.5, "memory": memory, "facts": facts(recipe)}
    (run / "result.json").write_text(json.dumps(result))
    return run


def export(run: Path, *more: object) -> Any:
    return qlora("export", run, "--to", "hub", *more)


def test_an_upload_has_the_adapter_and_a_card_and_is_private(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = export(run, "--repo", "me/tickets", "--licence", "apache-2.0", "--base", "someone/tiny")
    assert done.returncode == 0, done.stderr
    assert hub.repos == {"me/tickets": True}
    folder = tmp_path / "run-hub"
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"curves.png", "adapter_model.safetensors", "adapter_config.json"} <= hub.files.keys()
    said = done.stdout
    assert (
        said.index("adapter_model.safetensors")
        < said.index("files to me/tickets (private)")
        < said.index("done")
    )
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {
        "base_model": "someone/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["qlora", "lora"],
    }
    assert "| Held-out loss | 3.000 → 1.500" in card
    assert "](curves.png)" in card
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 'PeftModel.from_pretrained(model, "me/tickets")' in card
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"


def test_nothing_private_is_uploaded(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = export(run, "--repo", "me/tickets")
    assert done.returncode == 0, done.stderr
    texts = b"".join(hub.files.values())
    for private in ("PRIVATE ROW", "secret-customers", str(tmp_path), "my-account", "hf_not_a_real"):
        assert private.encode() not in texts
    card = hub.files["README.md"].decode()
    assert "| data | rows.jsonl (messages): 8 rows read, 6 trained, 2 held out |" in card
    assert "| trained | LoRA of rank 4: 10 parameters" in card
    assert b"rows.jsonl" in hub.files["recipe.yaml"]
    (run / "metrics.jsonl").unlink()  # curves take time
    (run / "adapter" / "chat_template.jinja").write_text(f"{{# {tmp_path}/mine.jinja #}}")
    done = export(run, "--repo", "me/other", "-o", "other")
    assert done.returncode == 2
    assert f"chat_template.jinja:1: holds the path {tmp_path}" in done.stderr
    (run / "adapter" / "chat_template.jinja").write_text("{# hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaa #}")
    assert "holds something like a secret key" in export(run, "--repo", "me/other", "-o", "other").stderr
    assert hub.repos.keys() == {"me/tickets"}
    assert not (tmp_path / "other").exists()


def test_a_downloaded_folder_is_an_adapter_again(recipe: Recipe, tmp_path: Path) -> None:
    base = recipe.base.model_copy(update={"model": "bundled/base"})
    run = finished_run(recipe.model_copy(update={"base": base}), targets=["q_proj"])
    done = export(run, "--dry-run", "-o", "mine")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        load_file(at / "adapter_model.safetensors") for at in (tmp_path / "mine", run / "adapter")
    )
    assert ours.keys() == theirs.keys()
    assert load_trained(tmp_path / "mine").recipe.adapter.targets == ["q_proj"]


def test_a_fully_trained_model_is_no_adapter(recipe: Recipe, tmp_path: Path) -> None:
    base, data = (
        {"model": "someone/base", "quantization": "none"},
        {"source": "someone/rows", "format": "messages"},
    )
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"base": base, "data": data, "adapter": {"method": "full"}})
    )
    write_card(None, Recipe.recorded(tmp_path / "recipe.yaml"), tmp_path, CardSettings("mine", merged=False))
    card = (tmp_path / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("someone/base", "finetune")
    assert (metadata["library_name"], metadata["datasets"]) == ("transformers", ["someone/rows"])
    assert "All weights of [someone/base](https://huggingface.co/someone/base), trained with qlora" in card
    assert 'AutoModelForCausalLM.from_pretrained("mine")' in card


def test_the_merged_model_is_uploaded_by_asking(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = export(run, "--repo", "me/whole", "--merged", "--public", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["page"].endswith("me/whole")
    assert hub.repos == {"me/whole": False}
    assert {"model.safetensors", "config.json", "README.md"} <= hub.files.keys()
    metadata = yaml.safe_load(hub.files["README.md"].decode().split("---")[1])
    assert metadata["library_name"] == "transformers"


def test_a_dry_run_uploads_nothing_and_refusals_keep_the_folder(hub: Hub, run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").unlink()  # curves take time
    assert export(run, "--dry-run").returncode == 0
    assert (hub.calls, hub.files) == ([], {})
    assert "add --repo OWNER/NAME, or --dry-run" in export(run).stderr
    assert "run-hub: already exists" in export(run, "--repo", "me/a").stderr
    hub.repos["me/open"] = False
    done = export(run, "--repo", "me/open", "-o", "open")
    assert (done.returncode, "me/open exists and is public" in done.stderr) == (2, True)
    hub.refuses = "create"
    done = export(run, "--repo", "me/no", "-o", "no")
    assert done.returncode == 74
    assert "cannot upload to me/no: " in done.stderr
    assert "hf upload me/no no" in done.stderr
    assert (tmp_path / "no" / "README.md").is_file()
    assert hub.files == {}
    assert export(run, "--repo", "not a name!", "-o", "bad").returncode == 2


def test_paths_in_texts_become_their_last_names(recipe_file: RecipeFile, tmp_path: Path) -> None:
    data = {
        "source": "data/deep/rows.jsonl",
        "held_out": "file:///x/y/z.csv",
        "template": "my/own/chat.jinja",
    }
    recipe = Recipe.load(recipe_file(data=data))
    recipe = recipe.model_copy(
        update={"adapter": recipe.adapter.model_copy(update={"start_from": "./mine/first"})}
    )
    clean = Clean.of(recipe)
    (tmp_path / "card").mkdir()
    write_card(None, recipe, tmp_path / "card", CardSettings("first", merged=False))
    assert "(LoRA continued from first)" in (tmp_path / "card/README.md").read_text()
    for text, expected in {
        "read data/deep/rows.jsonl: 3": "read rows.jsonl: 3",
        "from /home/me/x.jsonl, ~/a/b.txt and ../c/d.csv": "from x.jsonl, b.txt and d.csv",
        "eos </s>, [/INST] and a/b; https://x.example/a/b": "eos </s>, [/INST] and a/b; https://x.example/a/b",
    }.items():
        assert clean(text) == expected
    shared = yaml.safe_load(shared_recipe(recipe, clean))
    assert (shared["data"]["held_out"], shared["data"]["template"]) == ("z.csv", "chat.jinja")
    assert shared["adapter"]["from"] == "first"
    assert "tracking" not in shared
