"""`qlora adapter`: compose, compress, export, inspect and extract adapters without loading a model."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora.cli.arguments import Device, Json, TrustRemoteCode, show_device, startup_for
from qlora.cli.base_weights import base_weights, expert_norms
from qlora.cli.expert_layout import ExpertBase, Experts, with_experts
from qlora.cli.layer_changes import print_changes
from qlora.cli.tables import grouped, say, show_deviations, show_spectra, small
from qlora.errors import UsageError

if TYPE_CHECKING:
    from qlora.adapter.algebra.compose import ApproximationError
    from qlora.adapter.algebra.tensors import Adapter

MiB = 2**20

app = typer.Typer(
    help="Combine, compress and inspect adapters; extract one from a fine-tuned model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

AdapterArgument = Annotated[
    Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
]
To = Annotated[
    Path, typer.Option("--to", metavar="DIR", help="Folder of the new adapter; it must not exist.")
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Highest rank of a layer; stores the best approximation of that rank."),
]
Energy = Annotated[
    float | None,
    typer.Option(help="Share of each layer's squared singular values to keep, such as 0.99; sets the rank."),
]
Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Number format of the stored A and B.")]
Diffusers = Annotated[
    str | None,
    typer.Option(
        metavar="COMPONENT",
        help="Also write the file that diffusers reads; COMPONENT is unet, transformer or another part of a pipeline.",
    ),
]
PerLayer = Annotated[bool, typer.Option("--layers", help="Print one line per layer.")]


@app.command("compose")
def compose(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER:WEIGHT", help="Adapters with weights: runs/a:0.7 runs/b:0.3; -1 subtracts."
        ),
    ],
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = "float32",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Combine the adapters even if their bases differ.")
    ] = False,
    diffusers: Diffusers = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Add adapters, each with a weight, into a new adapter.

    The sum is exact, and its rank is the sum of the ranks.
    --rank or --energy stores the best approximation of a lower rank instead.

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
    made = _made_by(result, "compose", *parts)
    _save(made, to, deviations, per_layer, json_output, diffusers=diffusers)


@app.command("compress")
def compress(
    adapter: AdapterArgument,
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Number format of the stored A and B. Default: unchanged.")
    ] = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Lower an adapter's rank with the smallest possible error.

    Give the new size with --rank or --energy. The error is printed.

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


@app.command("export")
def export(
    adapter: AdapterArgument,
    to: To,
    dtype: DtypeOption = "float32",
    experts: Experts = None,
    base: ExpertBase = None,
    diffusers: Diffusers = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Write an adapter for vLLM, llama.cpp and other servers that read one alpha and one rank for all layers.

    rsLoRA's scaling and the alphas and ranks of single layers become part of A and B.
    The update of each layer stays the same; the rounding error is printed.

    [bold]qlora adapter export runs/mine --to served[/bold]
    """
    from qlora.adapter.algebra import tensors
    from qlora.adapter.algebra.plain import plain
    from qlora.storage.draft import check_absent

    check_absent(to)
    result, deviations = plain(tensors.read(adapter), dtype=tensors.DTYPES[dtype])
    made = _made_by(with_experts(result, experts, base), "export", str(adapter))
    _save(made, to, deviations, per_layer, json_output, diffusers=diffusers, exported=True)


@app.command("extract")
def extract(
    tuned: Annotated[
        str,
        typer.Argument(metavar="TUNED", help="Fine-tuned model: a safetensors folder or a cached hub id."),
    ],
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Model that it was tuned from: a folder or a cached hub id.")
    ],
    to: To,
    rank: Rank = None,
    energy: Energy = None,
    dtype: DtypeOption = "float32",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Extract an adapter of BASE from the fine-tuned model TUNED.

    The adapter is the low-rank approximation of the difference of their
    weights. Give its size with --rank or --energy.

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
    show_device(startup_for(json_output=json_output), device)
    tuned_folder = find_checkpoint(tuned)
    extra_files = _recipe_of(tuned_folder, base, trust_remote_code)
    console = Console(stderr=True)
    extracted = extracting.extract(
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
    made = replace(extracted.adapter, extra_files=extra_files)
    _save(made, to, extracted.deviations, per_layer, json_output, extracted.not_captured)


@app.command("inspect")
def inspect(
    adapter: AdapterArgument,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base to compare norms with. Default: the adapter's own base, if it is cached and small."
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw a picture: .png, .svg or .pdf.")
    ] = None,
    per_layer: PerLayer = False,
    json_output: Json = False,
) -> None:
    """Show each layer's norm, spectrum and effective rank, and judge the adapter's rank.

    The verdict is that the rank was too small, right or too large, or that the spectra do not tell.

    [bold]qlora adapter inspect runs/mine --picture spectra.png[/bold]
    """
    from qlora.adapter.algebra import tensors
    from qlora.adapter.algebra.spectrum import LIMITS, judge, spectra
    from qlora.adapter.trained_parts import describe_parts
    from qlora.report import pictures, spectrum_picture

    if picture is not None:
        pictures.require_format(picture)
    if (reason := tensors.method_in(tensors.adapter_folder(adapter)).why_no_sum) is not None:
        if picture is not None:
            raise UsageError(
                f"--picture draws spectra, and this adapter has none, because {reason}; leave it out"
            )
        print_changes(adapter, base, per_layer, json_output)
        return
    whole = tensors.read(adapter)
    weights = base_weights(whole, base)
    layers = spectra(whole, weights, expert_norms(whole, weights, given=base is not None))
    verdict = judge(layers)
    if picture is not None:
        spectrum_picture.draw(layers, picture, "/".join(adapter.parts[-2:]))
    if json_output:
        plain = {name: layer.as_json() for name, layer in layers.items()}
        shapes = {name: list(tensor.shape) for name, tensor in whole.parts.items()}
        print(json.dumps({"verdict": asdict(verdict), "limits": LIMITS, "layers": plain, "parts": shapes}))
        return
    show_spectra(layers, per_layer)
    for line in describe_parts(whole.config):
        say(f"\n{line}")
    say(f"\n{verdict.sentence} {LIMITS}")
    if whole.note is not None:
        say(f"note  {whole.note}")
    if verdict.enough is not None and not whole.has_experts_apart:
        print(
            f"\nTry it:  qlora adapter compress {adapter} --rank {verdict.enough} --to DIR && qlora eval DIR"
        )
    if picture is not None:
        print(f"picture  {picture}")


def _weighted(part: str) -> tuple[Path, float]:
    """Split an argument such as `runs/a:0.7` into path and weight."""
    path, colon, weight = part.rpartition(":")
    try:
        value = float(weight) if path and colon else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        raise UsageError(
            f"{part!r} is not ADAPTER:WEIGHT with a weight other than 0; write runs/a:0.7 or runs/b:-1"
        )
    return Path(path), value


def _check_size(rank: int | None, energy: float | None, *, needed: bool) -> None:
    """Check --rank and --energy; if `needed`, one of them must be given."""
    if rank is not None and energy is not None:
        raise UsageError("--rank and --energy cannot be used together; leave one out")
    if needed and rank is None and energy is None:
        raise UsageError("the new adapter needs a size: add --rank 8, say, or --energy 0.99")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy must be above 0 and at most 1, not {energy:g}")


def _made_by(adapter: "Adapter", command: str, *arguments: str) -> "Adapter":
    """Add a first line to the recipe, copied from the first adapter, with the command that made this one."""
    if "recipe.yaml" not in adapter.extra_files:
        return adapter
    made = " ".join(" ".join(["qlora adapter", command, *arguments]).split())
    note = f"# Made by `{made}`. Recipe of the first adapter; its section `adapter` no longer applies\n"
    return replace(
        adapter, extra_files={**adapter.extra_files, "recipe.yaml": note + adapter.extra_files["recipe.yaml"]}
    )


def _recipe_of(tuned: Path, base: str, trust_remote_code: bool) -> dict[str, str]:
    """Return the recipe of a full-training run, changed to an adapter on `base`; empty if `tuned` has no recipe."""
    from qlora.inference.load import recipe_of

    if not (tuned / "recipe.yaml").is_file():
        return {}
    changes = ["adapter.method=lora", f"base.model={json.dumps(base)}", "base.init=pretrained"]
    return {"recipe.yaml": recipe_of(tuned, changes, trust_remote_code=trust_remote_code).to_yaml()}


def _save(
    adapter: "Adapter",
    to: Path,
    deviations: dict[str, "ApproximationError"],
    per_layer: bool,
    json_output: bool,
    not_captured: dict[str, float | None] | None = None,
    *,
    diffusers: str | None = None,
    exported: bool = False,
) -> None:
    """Write the adapter, then print its ranks, its size and its error."""
    from qlora.adapter.algebra import plain, tensors
    from qlora.adapter.algebra.compose import relative_error
    from qlora.adapter.config import CONFIG_FILE, read_config

    written_bytes = tensors.write(adapter, to, diffusers=diffusers)
    advice = plain.note(read_config(to / CONFIG_FILE), to, exported=exported)
    note = "; ".join(filter(None, [adapter.note, advice])) or None
    dtype = tensors.dtype_name(next(iter(adapter.layers.values())).a.dtype)
    total = relative_error(deviations.values())
    if json_output:
        layers = {name: {**asdict(x), "relative_error": x.relative} for name, x in deviations.items()}
        result = {
            "to": str(to),
            "dtype": dtype,
            "bytes": written_bytes,
            "relative_error": total,
            "note": note,
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
    print(f"wrote  {to}  ({len(adapter.layers)} layers, {written_bytes / MiB:.2f} MiB)")
    if note is not None:
        say(f"note   {note}")
    if adapter.extra_files and not adapter.has_experts_apart:  # which qlora does not load
        print(f"\nTry it:  qlora eval {to}")


def _print_not_captured(
    changed: Mapping[str, float | None], deviations: "Mapping[str, ApproximationError]", per_layer: bool
) -> None:
    """Print the changed tensors that are not linear weights, and their share of the whole change."""
    norms = [norm for norm in changed.values() if norm is not None]
    outside, inside = math.hypot(*norms), math.hypot(*(x.norm for x in deviations.values()))
    counts = {name: len(group) for name, group in grouped(changed, per_layer).items()}
    names = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
    print(f"not captured, because an adapter of linear layers cannot hold them: {names}")
    print(f"       they hold {outside**2 / (outside**2 + inside**2):.1%} of the whole change (squared norm)")
    unmatched = [name for name, norm in changed.items() if norm is None]
    if unmatched:
        print(f"       in one checkpoint only, or with different shapes: {', '.join(unmatched)}")
