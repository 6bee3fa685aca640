"""The items of the record, the most valuable first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A program that measures something and prints lines; see `lines`."""

    name: str
    module: str
    """started as `python -m benchmarks.gpu.<module> --device DEVICE ...`"""
    seconds: int
    """expected on an H200; an estimate until a record exists"""
    purpose: str

    @property
    def command(self) -> list[str]:
        """Arguments of the Python interpreter that start the program."""
        return ["-m", f"benchmarks.gpu.{self.module}"]

    @property
    def limit(self) -> int:
        """Seconds after which the item is killed."""
        return 2 * self.seconds + 20


ITEMS = (
    Item(
        "ceilings", "ceilings", 20, "machine, versions; bandwidth and matrix products, the limits of all else"
    ),
    Item("tests", "suite", 75, "`pytest -m gpu`"),
    Item("kernels", "kernels", 30, "state, time and bandwidth of every Triton kernel, next to plain torch"),
    Item(
        "ours",
        "ours",
        100,
        "a step of ours by rows, recomputation and dropout, with the host's share and memory",
    ),
    Item("peers", "peers", 110, "PEFT tuned by hand, and TRL with Liger, on the same work as ours"),
    Item("memory", "memory", 90, "forecast and the driver's bytes of three runs"),
)
