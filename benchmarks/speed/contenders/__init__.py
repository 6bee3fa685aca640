"""The contenders and their flags. Each contender is a separate program: `python -m <its module> JOB.json`.

Flags:
    ckpt: recompute the layers' activations in the backward pass; without it they are kept.
    mlp: recompute only the activations of the MLPs; qlora only.
    packing: put several documents into a row.
    compile: torch.compile.
    liger: Liger's kernels.
    selective: TRL's checkpointing that keeps attention.
    offload: checkpointing with activations in host memory; in qlora also the input embedding.
"""

from dataclasses import dataclass

OURS = "qlora"


@dataclass(frozen=True)
class Contender:
    """A program and its flags."""

    program: str
    """name of a file in this folder without its extension, or the path of another file"""
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in reports, such as `trl +ckpt +packing`."""
        return " +".join((self.program.rsplit("/")[-1].removesuffix(".py"), *self.flags))

    @property
    def recomputed(self) -> str:
        """The part that is computed twice, a key of `flops.REPEATED`."""
        if "mlp" in self.flags:
            return "gate and up"
        if "ckpt" not in self.flags:
            return "nothing"
        return "layers without down_proj" if self.program == OURS else "layers"

    @property
    def command(self) -> list[str]:
        """Arguments of the Python interpreter that start the program."""
        if self.program.endswith(".py"):
            return [self.program]
        return ["-m", f"{__name__}.{self.program}"]


def _of(program: str, *flags: str) -> list[Contender]:
    return [Contender(program, tuple(group.split())) for group in flags]


def field(device: str, real: bool, mixture: bool = False) -> list[Contender]:
    """Return all contenders for `device`, with real data or dense tokens.

    PEFT's documentation turns checkpointing on, so `peft_documented` has no other form. The file for Unsloth names
    linear layers only, which leaves out the experts of a mixture.
    """
    contenders = _of("qlora", "ckpt", "mlp", "")
    contenders += _of("peft_documented", "ckpt")
    contenders += _of("peft_tuned", "ckpt", "")
    contenders += _of("peft_compiled", "ckpt", "")
    contenders += _of("trainer", "ckpt", "", "compile")
    contenders += _of("trl", "ckpt", "")
    if real:
        contenders += _of("qlora", "ckpt packing", "mlp packing", "packing")
        contenders += _of("trl", "ckpt packing", "packing")
    if device == "cuda":
        contenders += _of("qlora", "ckpt offload")
        contenders += _of("trainer", "ckpt liger", "liger")
        contenders += _of("trl", "ckpt liger", "liger", "ckpt selective")
        contenders += _of("unsloth", "ckpt offload", "ckpt", "")
    if mixture:
        contenders = [c for c in contenders if c.program != "unsloth"]
    order = [OURS, "peft_documented", "peft_tuned", "peft_compiled", "trainer", "trl", "unsloth"]
    return sorted(contenders, key=lambda contender: order.index(contender.program))


def chosen(names: str | None, device: str, real: bool, mixture: bool = False) -> list[Contender]:
    """Return the contenders of a comma-separated list.

    Args:
        names: `qlora` for all its forms, `qlora +ckpt` for one form, or the path of a .py file. None gives all
            contenders.
        device: `cpu` or `cuda`.
        real: True for real data, which adds packing.
        mixture: True for a mixture of experts, which leaves some out.

    Raises:
        SystemExit: No contender has the name.
    """
    all_contenders = field(device, real, mixture)
    if names is None:
        return all_contenders
    contenders: list[Contender] = []
    for name in (part.strip() for part in names.split(",")):
        program, *flags = name.split(" +")
        if program.endswith(".py"):
            contenders.append(Contender(program, tuple(flags)))
            continue
        matching = [c for c in all_contenders if name == c.name or (not flags and name == c.program)]
        if not matching:
            raise SystemExit(
                f"no contender {name!r}; choose from: {', '.join(c.name for c in all_contenders)}"
            )
        contenders += matching
    return list(dict.fromkeys(contenders))
