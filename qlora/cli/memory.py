"""The memory table and its assumptions as commands print them."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora.cli.tables import print_table


def print_memory(memory: Mapping[str, Any]) -> None:
    """Print the table of a memory.json on standard output."""
    from qlora.report.memory_files import table

    print_table(table(memory))


def assumptions(memory: Mapping[str, Any]) -> Iterator[str]:
    """Yield the assumptions of a forecast as sentences."""
    from qlora.recipe.sizes import unit_for
    from qlora.report.memory_comparison import Comparison

    yield f"Assumed: {Comparison(memory).workload}; computed in {memory['workload']['compute_dtype']}."
    context_bytes = memory["forecast"]["parts"].get("device_context", 0)
    if context_bytes:
        context = unit_for(context_bytes).text(context_bytes)
        yield f"The GPU is otherwise empty; CUDA itself takes {context}, which is counted above."
