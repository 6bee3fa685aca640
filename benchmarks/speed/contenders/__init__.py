"""Who competes, with which flags. Each contender is a program of its own: `python -m <its module> JOB.json`.

Flags: `ckpt` recomputes the layers' activations in the backward (without it they are kept), `mlp`, of ours, only those
of the MLPs, `packing` puts several documents into a row, `compile` is torch.compile, `liger` Liger's kernels,
`selective` TRL's checkpointing that keeps attention, `offload` checkpointing with its activations on the host, of ours
with the embedding there too.
"""

from dataclasses import dataclass

OURS = "qlora"


@dataclass(frozen=True)
class Contender:
    """A program and the flags it is started with."""

    program: str
    """a file of this folder without its ending, or the path of another"""
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is called in reports: `trl +ckpt +packing`."""
        return " +".join((self.program.rsplit("/")[-1].removesuffix(".py"), *self.flags))

    @property
    def recomputed(self) -> str:
        """What it computes twice, as `flops.REPEATED` names it."""
        if "mlp" in self.flags:
            return "gate and up"
        if "ckpt" not in self.flags:
            return "nothing"
        return "layers without down_proj" if self.program == OURS else "layers"

    @property
    def command(self) -> list[str]:
        """What follows the interpreter on its command line."""
        if self.program.endswith(".py"):
            return [self.program]
        return ["-m", f"{__name__}.{self.program}"]


def _of(program: str, *flags: str) -> list[Contender]:
    return [Contender(program, tuple(group.split())) for group in flags]


def field(device: str, real: bool) -> list[Contender]:
    """Everybody who competes on `device`, over real data or dense tokens.

    PEFT's documentation turns checkpointing on, so that contender has no other form.
    """
    found = _of("qlora", "ckpt", "mlp", "")
    found += _of("peft_documented", "ckpt")
    found += _of("peft_tuned", "ckpt", "")
    found += _of("peft_compiled", "ckpt", "")
    found += _of("trainer", "ckpt", "", "compile")
    found += _of("trl", "ckpt", "")
    if real:
        found += _of("qlora", "ckpt packing", "mlp packing", "packing")
        found += _of("trl", "ckpt packing", "packing")
    if device == "cuda":
        found += _of("qlora", "ckpt offload")
        found += _of("trainer", "ckpt liger", "liger")
        found += _of("trl", "ckpt liger", "liger", "ckpt selective")
        found += _of("unsloth", "ckpt offload", "ckpt", "")
    order = [OURS, "peft_documented", "peft_tuned", "peft_compiled", "trainer", "trl", "unsloth"]
    return sorted(found, key=lambda contender: order.index(contender.program))


def chosen(names: str | None, device: str, real: bool) -> list[Contender]:
    """The contenders of a comma-separated list: `qlora`, all forms of it; `qlora +ckpt`, that one; a .py file.

    None gives the whole field. Raises SystemExit for a name that nobody has.
    """
    everybody = field(device, real)
    if names is None:
        return everybody
    found: list[Contender] = []
    for name in (part.strip() for part in names.split(",")):
        program, *flags = name.split(" +")
        if program.endswith(".py"):
            found.append(Contender(program, tuple(flags)))
            continue
        matching = [c for c in everybody if name == c.name or (not flags and name == c.program)]
        if not matching:
            raise SystemExit(f"no contender {name!r}; there are: {', '.join(c.name for c in everybody)}")
        found += matching
    return list(dict.fromkeys(found))
