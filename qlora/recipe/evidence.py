"""Published findings about rank, targets, learning rate and batch size, from models of 1B parameters and more.

The defaults of a recipe follow them. What we measure ourselves on a small model (docs/benchmarks/methods.md) changes
neither a default nor a finding here; `qlora check` shows it for bases of that size only.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A published finding about one key of a recipe."""

    key: str
    claim: str
    source: str
    models: str
    """the models it was found on"""


SMALLEST_PARAMETERS = 1_000_000_000
"""the smallest base that these findings speak of"""

CAPACITY = Finding(
    "adapter.rank",
    "LoRA learns as much as full fine-tuning while it has at least as many parameters as there are trained tokens, as "
    "a rough rule",
    "LoRA Without Regret (Schulman et al. 2025), and the same laboratory's LoRA primer",
    "Llama 3 and Qwen 3",
)
TARGETS = Finding(
    "adapter.targets",
    "all linear layers learn more than attention alone, also with equally many parameters",
    "QLoRA (Dettmers et al. 2023, figure 2); LoRA Without Regret (Schulman et al. 2025)",
    "LLaMA 7B; Llama 3",
)
LORA_RATE = Finding(
    "optimizer.lr",
    "LoRA wants a learning rate from 1e-4 to 5e-4, about ten times that of full fine-tuning, at any rank",
    "the LoRA documents; QLoRA (table 9: 2e-4 up to 13B, 1e-4 above); LoRA Without Regret (Schulman et al. 2025)",
    "LLaMA 7B to 65B; Llama 3 and Qwen 3",
)
FULL_RATE = Finding(
    "optimizer.lr",
    "full fine-tuning wants a learning rate from 1e-5 to 5e-5",
    "the LoRA documents",
    "not said",
)
BATCH = Finding(
    "training.global_batch_size",
    "LoRA loses more than full fine-tuning when a step has many rows, at any rank",
    "LoRA Without Regret (Schulman et al. 2025)",
    "Llama 3",
)

FINDINGS = (CAPACITY, TARGETS, LORA_RATE, FULL_RATE, BATCH)

MEASURED_PARAMETERS = 3_737_856
"""the base of our own measurements"""
MEASURED_LORA_RATES, MEASURED_FULL_RATES = (4e-3, 8e-3), (2.5e-4, 5e-4)
"""the two best learning rates there, of LoRA (rank 8, all linears) and of full fine-tuning, on E2E NLG"""

LORA_RATES, FULL_RATES = (1e-4, 5e-4), (1e-5, 5e-5)
LARGE_BATCH = 256
"""rows of a step from which on the advice warns; the number is our choice"""
