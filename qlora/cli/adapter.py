"""`qlora adapter`: compose, compress, inspect and extract adapters; no model has to be loaded for it."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora.cli.arguments import Json, TrustRemoteCode
from qlora.cli.tables import grouped, say, show_deviations, show_spectra, small
from qlora.errors import ModelError, UsageError

if TYPE_CHECKING:
    from qlora.adapter.algebra.compose import ApproximationError
    from qlora.adapter.algebra.tensors import Adapter
    from qlora.storage.safetensors_files import ShardReader

MiB = 2**20

CHEAP_BYTES = 4 * 2**30
"""A base up to this size is read without being asked for, to compare norms."""

app = typer.Typer(
    help="Combine adapters, make them smaller, look into them, take one out of a tuned model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

AdapterArgument = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder or an adapter's folder.")
]
To = Annotated[Path, typer.Option("--to", metavar="DIR", help="The new adapter's folder; it must not exist.")]
Rank = Annotated[
    int | None, typer.Option(min=1, help="The best approximation of at most this rank in every layer.")
]
Energy = Annotated[
    float | None,
    typer.Option(help="The least rank that keeps this share of a layer's squared singular values, as 0.99."),
]
Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="What A and B are stored in.")]
PerLayer = Annotated[bool, typer.Option("--layers", help="A line for every layer.")]


@app.command("compose")
def compose(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER:WEIGHT...", help="As runs/a:0.7 runs/b:0.3; runs/b:-1 subtracts."),
    ],
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = "float32",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine adapters though they name different bases.")
    ] = False,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Add adapters up with weights: exactly, the ranks added, or as the best approximation of a lower rank.

    [bold]qlora adapter compose runs/a:0.7 runs/b:0.3 --to mix[/bold]
    [bold]qlora adapter compose runs/a:1 runs/b:-1 --to without-b --rank 16[/bold]
    """
    weighted = [_weighted(part) for part in parts]
    _check_size(rank, energy, needed=False)
    from qlora.adapter.algebra import compose as composing
    from qlora.adapter.algebra import tensors
    from qlora.storage.draft import check_absent

    check_absent(to)
    adapters = [(tensors.read(path), weight) for path, weight in weighted]
    result, deviations = composing.compose(
        adapters, rank=rank, energy=energy, dtype=tensors.DTYPES[dtype], any_base=any_base
    )
    _save(_made_by(result, "compose", *parts), to, deviations, per_layer, json_output)


@app.command("compress")
def compress(
    adapter: AdapterArgument,
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="What A and B are stored in; as they are if left out.")
    ] = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Lower an adapter's rank with the least possible error.

    [bold]qlora adapter compress runs/mine --to small --rank 8[/bold]
    [bold]qlora adapter compress runs/mine --to small --energy 0.99[/bold]
    """
    _check_size(rank, energy, needed=True)
    from qlora.adapter.algebra import compose as composing
    from qlora.adapter.algebra import tensors
    from qlora.storage.draft import check_absent

    check_absent(to)
    whole = tensors.read(adapter)
    stored_in = None if dtype is None else tensors.DTYPES[dtype]
    result, deviations = composing.compress(whole, rank=rank, energy=energy, dtype=stored_in)
    made = _made_by(result, "compress", str(adapter), f"--rank {rank}" if rank else f"--energy {energy}")
    _save(made, to, deviations, per_layer, json_output)


@app.command("extract")
def extract(
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="A folder of safetensors or a cached hub id.")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was tuned from, likewise.")],
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = "float32",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where differences are decomposed.")
    ] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Take the low-rank difference of two full checkpoints as an adapter of the second.

    [bold]qlora adapter extract runs/full bundled/base --to adapter --rank 16[/bold]
    """
    _check_size(rank, energy, needed=True)
    from rich.console import Console
    from rich.progress import track

    from qlora.adapter.algebra import extract as extracting
    from qlora.adapter.algebra import tensors
    from qlora.model.load import load_architecture
    from qlora.recipe import Base
    from qlora.storage.draft import check_absent
    from qlora.storage.safetensors_files import ShardReader, find_checkpoint

    check_absent(to)
    tuned_folder = find_checkpoint(tuned)
    extra_files = _recipe_of(tuned_folder, base, trust_remote_code)
    console = Console(stderr=True)
    found = extracting.extract(
        ShardReader(tuned_folder),
        ShardReader(find_checkpoint(base)),
        load_architecture(Base(model=str(tuned_folder), trust_remote_code=trust_remote_code)),
        rank=rank,
        energy=energy,
        base_model=base,
        dtype=tensors.DTYPES[dtype],
        device=device,
        progress=lambda names: track(names, "layers", console=console, disable=not console.is_terminal),
    )
    made = replace(found.adapter, extra_files=extra_files)
    _save(made, to, found.deviations, per_layer, json_output, found.not_captured)


@app.command("inspect")
def inspect(
    adapter: AdapterArgument,
    base: Annotated[
        str | None,
        typer.Option(help="The base's folder, to compare norms; found by its name if it is here and small."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it too: .png, .svg or .pdf.")
    ] = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """What was learned, layer by layer: norms, spectra, effective ranks; and whether the rank was well chosen.

    [bold]qlora adapter inspect runs/mine --picture spectra.png[/bold]
    """
    from qlora.adapter.algebra import tensors
    from qlora.adapter.algebra.spectrum import LIMITS, judge, spectra
    from qlora.report import spectrum_picture

    if picture is not None:
        spectrum_picture.require_format(picture)
    whole = tensors.read(adapter)
    layers = spectra(whole, _base_weights(whole, base))
    verdict = judge(layers)
    if picture is not None:
        spectrum_picture.draw(layers, picture, "/".join(adapter.parts[-2:]))
    if json_output:
        plain = {name: layer.as_json() for name, layer in layers.items()}
        print(json.dumps({"verdict": asdict(verdict), "limits": LIMITS, "layers": plain}))
        return
    show_spectra(layers, per_layer)
    say(f"\n{verdict.sentence} {LIMITS}")
    if verdict.enough is not None:
        print(
            f"\nTry it:  qlora adapter compress {adapter} --rank {verdict.enough} --to DIR && qlora eval DIR"
        )
    if picture is not None:
        print(f"picture  {picture}")


def _weighted(part: str) -> tuple[Path, float]:
    """`runs/a:0.7` as a path and a weight."""
    path, colon, weight = part.rpartition(":")
    try:
        value = float(weight) if path and colon else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise UsageError(
            f"{part!r} is not ADAPTER:WEIGHT with a weight other than 0, as in runs/a:0.7 or runs/b:-1"
        )
    return Path(path), value


def _check_size(rank: int | None, energy: float | None, *, needed: bool) -> None:
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy exclude each other")
    if needed and rank is None and energy is None:
        raise UsageError("how small? Give --rank, as 8, or --energy, as 0.99")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1, not {energy:g}")


def _made_by(adapter: "Adapter", command: str, *arguments: str) -> "Adapter":
    """The recipe that travels along is that of the first adapter, and says so."""
    if "recipe.yaml" not in adapter.extra_files:
        return adapter
    made = " ".join(" ".join(["qlora adapter", command, *arguments]).split())
    note = f"# Made by `{made}`: this is the recipe of the first; its adapter section no longer holds\n"
    return replace(
        adapter, extra_files={**adapter.extra_files, "recipe.yaml": note + adapter.extra_files["recipe.yaml"]}
    )


def _recipe_of(tuned: Path, base: str, trust_remote_code: bool) -> dict[str, str]:
    """The recipe of a run of full training, if that is what was tuned, with an adapter on `base` instead."""
    from qlora.inference.load import recipe_of

    if not (tuned / "recipe.yaml").is_file():
        return {}
    changes = ["adapter.method=lora", f"base.model={json.dumps(base)}", "base.init=pretrained"]
    return {"recipe.yaml": recipe_of(tuned, changes, trust_remote_code=trust_remote_code).to_yaml()}


def _base_weights(adapter: "Adapter", given: str | None) -> "ShardReader | None":
    """The base's weights: those asked for, else those of the recorded base if they are here and small enough.

    Other weights may have its name by now, and a run that made its base up, by base.init, never used any of a file.
    """
    from qlora.adapter.identity import IDENTITY_FILE, BaseIdentity, checkpoint_digest
    from qlora.storage.safetensors_files import ShardReader, find_checkpoint

    if given is not None:
        return ShardReader(find_checkpoint(given))
    name, revision = (adapter.config.get(key) for key in ("base_model_name_or_path", "revision"))
    if isinstance(name, str):
        with suppress(ModelError):
            identity = adapter.extra_files.get(IDENTITY_FILE)
            used = BaseIdentity.parse(identity).weights if identity else None
            weights = ShardReader(find_checkpoint(name, revision))
            small = sum(file.stat().st_size for file in weights.files) <= CHEAP_BYTES
            return weights if small and used in (None, checkpoint_digest(weights.files)) else None
    return None


def _save(
    adapter: "Adapter",
    to: Path,
    deviations: dict[str, "ApproximationError"],
    per_layer: bool,
    json_output: bool,
    not_captured: dict[str, float | None] | None = None,
) -> None:
    """Write the adapter, then say what it is and how far from what was asked."""
    from qlora.adapter.algebra import tensors
    from qlora.adapter.algebra.compose import relative_error

    written_bytes = tensors.write(adapter, to)
    dtype = tensors.dtype_name(next(iter(adapter.layers.values())).a.dtype)
    total = relative_error(deviations.values())
    if json_output:
        layers = {name: {**asdict(x), "relative_error": x.relative} for name, x in deviations.items()}
        result = {
            "to": str(to),
            "dtype": dtype,
            "bytes": written_bytes,
            "relative_error": total,
            "layers": layers,
        }
        if not_captured is not None:
            result["not_captured"] = not_captured
        print(json.dumps(result))
        return
    show_deviations(deviations, per_layer)
    worst = max(deviations, key=lambda name: deviations[name].relative)
    print(
        f"\nerror  {small(total)} of all layers' norm, rounding to {dtype} included; at most "
        f"{small(deviations[worst].relative)}, in {worst}"
    )
    if not_captured:
        _print_not_captured(not_captured, deviations, per_layer)
    print(f"wrote  {to}  ({len(deviations)} layers, {written_bytes / MiB:.2f} MiB)")
    if adapter.extra_files:
        print(f"\nTry it:  qlora eval {to}")


def _print_not_captured(
    changed: Mapping[str, float | None], deviations: "Mapping[str, ApproximationError]", per_layer: bool
) -> None:
    """What changed in training and is no linear weight, and how much of all that changed it is."""
    norms = [norm for norm in changed.values() if norm is not None]
    outside, inside = math.hypot(*norms), math.hypot(*(x.norm for x in deviations.values()))
    counts = {name: len(group) for name, group in grouped(changed, per_layer).items()}
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
    print(f"not captured, as no adapter of linear layers can hold it: {names}")
    print(
        f"       {outside**2 / (outside**2 + inside**2):.1%} of all that changed (squared norm) is in those"
    )
    odd = [name for name, norm in changed.items() if norm is None]
    if odd:
        print(f"       in one checkpoint only, or of other shapes: {', '.join(odd)}")
