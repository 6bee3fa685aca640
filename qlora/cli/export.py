"""`qlora export`: write a run for llama.cpp, Ollama or the hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import IMPORTS, AnyBase, Device, Json, TrustRemoteCode, show_device, startup_for
from qlora.cli.merge import shown_progress
from qlora.errors import UsageError

if TYPE_CHECKING:
    from qlora.export.gguf_model import Exported
    from qlora.export.source import ModelSource
    from qlora.tracking.startup import Startup

MiB = 2**20

PLACES = ("gguf", "ollama", "hub")
MODEL_TYPES: tuple[str, ...] = ("bf16", "f16", "f32", "q8_0")
ADAPTER_TYPES: tuple[str, ...] = ("f32", "f16", "bf16")

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="File or folder to write; it must not exist. Default: named after the run, in this folder.",
    ),
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="|".join(MODEL_TYPES),
        help="Number format of the weights. Default: bf16, the merged numbers as they are; f32 for an adapter.",
    ),
]
Onto = Annotated[
    str | None,
    typer.Option(
        metavar="dequantized|original",
        help="Weights that the adapter is added to. Default: those that it was trained with.",
    ),
]
Repo = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="hub: the repository; it is made if it is missing.")
]
Licence = Annotated[
    str | None, typer.Option("--licence", metavar="ID", help="hub: licence, such as apache-2.0.")
]
BaseId = Annotated[
    str | None,
    typer.Option("--base", metavar="OWNER/NAME", help="hub: id of the base, if the run used a local folder."),
]
Adapter = Annotated[
    bool | None,
    typer.Option(
        "--adapter/--merged",
        help="The adapter alone, or base and adapter as one model. Default: merged; for the hub the adapter.",
    ),
]


@dataclass(frozen=True)
class _Wanted:
    """The options of one export."""

    run: str
    output: Path | None
    kind: str
    onto: str | None
    any_base: bool
    trust_remote_code: bool
    device: str

    @property
    def name(self) -> str:
        folder = Path(self.run).resolve()
        return folder.parent.name if folder.name in ("adapter", "model") else folder.name

    def source(self, startup: "Startup") -> "ModelSource":
        """Find the model, and show the device that merges it."""
        from qlora.export.source import model_source
        from qlora.runtime.device import device_named

        show_device(startup, self.device)
        return model_source(
            self.run,
            onto=self.onto,
            device=device_named(self.device),
            any_base=self.any_base,
            trust_remote_code=self.trust_remote_code,
        )


def export(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN_OR_MODEL", help="Folder of a run, an adapter or a merged model."),
    ],
    to: Annotated[str, typer.Option("--to", metavar="|".join(PLACES), help="The program to write for.")],
    output: Output = None,
    adapter: Adapter = None,
    kind: Kind = None,
    onto: Onto = None,
    repo: Repo = None,
    public: Annotated[
        bool, typer.Option("--public", help="hub: everyone can see it. Default: private.")
    ] = False,
    licence: Licence = None,
    base: BaseId = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="hub: write the folder, upload nothing.")
    ] = False,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Write a run for other programs: llama.cpp (a GGUF file), Ollama (a folder), or the hub (with a model card).

    For gguf, a folder that was written by qlora merge, or a base, can be exported too.

    [bold]qlora export runs/quickstart --to gguf[/bold]
    [bold]qlora export runs/quickstart --to gguf --adapter[/bold]
    [bold]qlora export runs/quickstart --to ollama[/bold]
    [bold]qlora export runs/quickstart --to hub --repo me/tickets --dry-run[/bold]
    """
    if to not in PLACES:
        raise typer.BadParameter(f"--to must be one of {', '.join(PLACES)}, not {to!r}")
    alone = adapter is not False if to == "hub" else bool(adapter)
    hub = _Hub(repo, public, licence, base, dry_run, merged=not alone)
    _check_options(to, alone, kind, onto, hub)
    chosen = kind or ("f32" if alone else "bf16")
    wanted = _Wanted(run, output, chosen, onto, any_base, trust_remote_code, device)
    startup = startup_for(json_output=json_output)
    if to == "hub":
        _to_hub(wanted, startup, hub, json_output)
    else:
        _to_file(wanted, startup, to, alone, json_output)


@dataclass(frozen=True)
class _Hub:
    """The options of an export to the hub."""

    repo: str | None
    public: bool
    licence: str | None
    base: str | None
    dry_run: bool
    merged: bool

    @property
    def given(self) -> list[str]:
        """The options that the user gave."""
        options = {
            "--repo": self.repo,
            "--public": self.public,
            "--licence": self.licence,
            "--base": self.base,
        }
        return [name for name, value in {**options, "--dry-run": self.dry_run}.items() if value]


def _check_options(to: str, alone: bool, kind: str | None, onto: str | None, hub: _Hub) -> None:
    """Raise an error for an option that has no effect, or that is missing."""
    kinds = MODEL_TYPES[:1] if to == "hub" else ADAPTER_TYPES if alone else MODEL_TYPES
    if kind is not None and kind not in kinds:
        raise typer.BadParameter(f"--type must be one of {', '.join(kinds)}, not {kind!r}")
    if alone and onto is not None:
        raise UsageError(
            "--onto chooses what an adapter is merged with, and --adapter merges nothing; leave one out"
        )
    if to == "ollama" and alone:
        raise UsageError("--to ollama writes the merged model; leave --adapter out, or use --to gguf")
    if to != "hub" and hub.given:
        raise UsageError(
            f"{hub.given[0]} belongs to --to hub, and has no effect with --to {to}; leave it out"
        )
    if to == "hub" and hub.repo is None and not hub.dry_run:
        raise UsageError("--to hub needs the name of the repository: add --repo OWNER/NAME, or --dry-run")


def _to_file(wanted: _Wanted, startup: "Startup", to: str, alone: bool, json_output: bool) -> None:
    """Write files for llama.cpp or Ollama, and say how to use them."""
    with startup.stage(IMPORTS):
        from qlora.export.gguf_model import require_gguf
    require_gguf()
    if to == "ollama":
        written = _ollama_folder(wanted, startup)
        use = f"ollama create {wanted.name} -f {written.path / 'Modelfile'}"
    elif alone:
        written = _adapter_file(wanted)
        use = f"llama-cli -m BASE.gguf --lora {written.path}"
    else:
        written = _model_file(wanted, startup)
        use = f"llama-cli -m {written.path}"
    _show(written, use, json_output)


def _to_hub(wanted: _Wanted, startup: "Startup", hub: _Hub, json_output: bool) -> None:
    """Write the folder for the hub, say what is in it, and upload it."""
    from rich.console import Console

    with startup.stage(IMPORTS):
        from qlora.export.hub import Upload, upload, write_folder
    from qlora.report.model_card import CardSettings, Clean, write_card

    settings = CardSettings(wanted.name, hub.merged, hub.licence, hub.base, hub.repo)
    folder = write_folder(
        wanted.run,
        wanted.output or Path(f"{wanted.name}-hub"),
        card=lambda run, recipe, to: write_card(run, recipe, to, settings),
        cleaner=lambda recipe: Clean.of(recipe, hub.base),
        source=wanted.source(startup) if hub.merged else None,
    )
    planned = Upload(folder, hub.repo or "", private=not hub.public)
    console = Console(highlight=False, markup=False, soft_wrap=True, quiet=json_output)
    for file in planned.files:
        console.print(f"  {file.relative_to(folder)}  {file.stat().st_size / MiB:,.2f} MiB")
    console.print(f"written  {folder}")
    page = None
    if not hub.dry_run:
        seen = "everyone can see it" if hub.public else "private"
        console.print(f"upload   these {len(planned.files)} files to {hub.repo} ({seen})")
        page = upload(planned)
        console.print(f"done     {page}")
    if json_output:
        files = [str(file.relative_to(folder)) for file in planned.files]
        print(json.dumps({"path": str(folder), "files": files, "repo": hub.repo, "page": page}))


def _model_file(wanted: _Wanted, startup: "Startup") -> "Exported":
    """Write the merged model as one GGUF file."""
    from qlora.export.gguf_model import write_model

    source = wanted.source(startup)
    path = wanted.output or Path(f"{wanted.name}-{wanted.kind}.gguf")
    with shown_progress() as progress:
        return write_model(source, path, kind=wanted.kind, progress=progress)


def _ollama_folder(wanted: _Wanted, startup: "Startup") -> "Exported":
    """Write the merged model and its Modelfile into one folder."""
    from qlora.export.ollama import write_ollama

    source = wanted.source(startup)
    with shown_progress() as progress:
        path = wanted.output or Path(f"{wanted.name}-ollama")
        return write_ollama(source, path, kind=wanted.kind, progress=progress)


def _adapter_file(wanted: _Wanted) -> "Exported":
    """Write the adapter alone as one GGUF file."""
    from qlora.export.gguf_adapter import write_adapter

    path = wanted.output or Path(f"{wanted.name}-adapter-{wanted.kind}.gguf")
    return write_adapter(wanted.run, path, kind=wanted.kind, trust_remote_code=wanted.trust_remote_code)


def _show(written: "Exported", use: str, json_output: bool) -> None:
    """Print what was written, and how to use it."""
    from rich.console import Console

    if json_output:
        print(json.dumps(written.as_json()))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    size = f"{written.tensors} tensors in {written.kind}, {written.bytes / MiB:,.1f} MiB"
    console.print(f"written  {written.path}  ({size})")
    console.print(f"use it   {use}")
    for note in written.notes:
        console.print(f"note     {note}")
