"""GPUs by name, with the memory that a process really gets.

A card of "24 GB" has 24 GiB of chips, but a process sees less: driver, display and error correction keep a part.
`Card.memory_bytes` is the total that torch reports (`torch.cuda.mem_get_info()[1]`), which also `qlora train` compares
with. Drivers differ by about 1%; where public reports differ, the table has the smallest. It has no card without a
public report; pass the size of such a card.
"""

import difflib
import re
from dataclasses import dataclass

from qlora.errors import UsageError
from qlora.recipe.sizes import GIB, parse_size

_WORDS = re.compile(r"nvidia|geforce|tesla|quadro|[^a-z0-9]")


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    marketed_gb: int
    """memory on its data sheet, in GB"""
    gib: float
    """total that torch reports on Linux, in GiB"""
    source: str
    """public report of this total"""
    bfloat16: bool = True
    """False for a card below compute capability 8.0, on which `base.compute_dtype: auto` is float32"""

    @property
    def memory_bytes(self) -> int:
        """Memory that a process gets, in bytes."""
        return int(self.gib * GIB.unit_bytes)


_ISSUES = "https://github.com/"

CARDS = (
    Card("RTX 3060", 12, 11.63, _ISSUES + "vllm-project/vllm/issues/27934"),
    Card("RTX 3080", 10, 9.78, _ISSUES + "zai-org/CogVideo/issues/34"),
    Card("RTX 3090", 24, 23.69, _ISSUES + "bigcode-project/starcoder/issues/15"),
    Card("RTX 4090", 24, 23.61, _ISSUES + "pinokiofactory/flux-webui/issues/11"),
    Card("RTX 5080", 16, 15.48, _ISSUES + "vllm-project/vllm/issues/14452"),
    Card("RTX 5090", 32, 31.36, _ISSUES + "TrajectoryCrafter/TrajectoryCrafter/issues/20"),
    Card("RTX A4000", 16, 15.61, _ISSUES + "DengKaiCQ/VGGT-Long/issues/6"),
    Card("RTX A5000", 24, 23.68, _ISSUES + "zai-org/GLM-4/issues/730"),
    Card("RTX 6000 Ada", 48, 44.43, _ISSUES + "DINGYANB/MTVCrafter/issues/21"),
    Card("RTX 8000", 48, 47.45, _ISSUES + "SkyworkAI/SkyReels-V1/issues/78", bfloat16=False),
    Card("T4", 16, 14.56, _ISSUES + "AlphaGPU/leetgpu-challenges/issues/52", bfloat16=False),
    Card("V100 32GB", 32, 31.74, _ISSUES + "liucongg/ChatGLM-Finetuning/issues/73", bfloat16=False),
    Card("A30", 24, 23.53, _ISSUES + "google/RB-Modulation/issues/5"),
    Card("L20", 48, 44.53, _ISSUES + "Tencent-Hunyuan/HunyuanCustom/issues/36"),
    Card("L40S", 48, 44.53, _ISSUES + "Wan-Video/Wan2.1/issues/205"),
    Card("A100 40GB", 40, 39.50, _ISSUES + "TianheWu/CoSeR/issues/10"),
    Card("A100 80GB", 80, 79.14, _ISSUES + "lianqi1008/Control-GIC/issues/6"),
    Card("H100 80GB", 80, 79.11, _ISSUES + "vllm-project/vllm/issues/27508"),
    Card("H100 NVL", 94, 93.00, _ISSUES + "ali-vilab/VACE/issues/56"),
    Card("B200", 192, 178.35, _ISSUES + "pytorch/ao/pull/4002"),
)
"""in the order of `qlora estimate --gpu list`"""

DEFAULTS = {"h100": "H100 80GB", "v100": "V100 32GB"}
"""the card that is meant by a name which several sizes share; A100 has no default, because both sizes are common"""


def capacity_bytes(text: str) -> int:
    """Return the memory of a GPU given as a size, such as 24GiB, or as a name, such as rtx4090.

    Raises:
        UsageError: the text is neither; the message lists similar names.

    Examples:
        >>> capacity_bytes("24GiB") == 24 * 2**30
        True
        >>> capacity_bytes("4090") == capacity_bytes("NVIDIA GeForce RTX 4090")
        True
    """
    try:
        return parse_size(text)
    except ValueError:
        return find(text).memory_bytes


def computes_bfloat16(text: str) -> bool:
    """Return False if `text`, as in `capacity_bytes`, is the name of a card without bfloat16."""
    try:
        parse_size(text)
    except ValueError:
        return find(text).bfloat16
    return True


def find(name: str) -> Card:
    """Return the card with a name, in any spelling: "rtx4090", "RTX-4090" and "4090" are the same.

    Raises:
        UsageError: no card has this name, or cards of several sizes have it.
    """
    wanted = _key(name)
    keys = {_key(card.name): card for card in CARDS}
    if (default := DEFAULTS.get(wanted)) is not None:
        wanted = _key(default)
    for key in (wanted, f"rtx{wanted}", f"rtxa{wanted}"):
        if key in keys:
            return keys[key]
    beginnings = [card.name for key, card in keys.items() if wanted and key.startswith(wanted)]
    if len(beginnings) == 1:
        return keys[_key(beginnings[0])]
    if beginnings:
        raise UsageError(f"--gpu: {name!r} can be {' or '.join(beginnings)}; name one of them")
    similar = [keys[key].name for key in difflib.get_close_matches(wanted, keys, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(similar)}?" if similar else "."
    raise UsageError(
        f"--gpu: {name!r} is neither a memory size, such as 24GiB, nor a known card{hint} Pass the memory of the "
        "card, or choose a card of --gpu list"
    )


def smallest(needed_bytes: int) -> Card | None:
    """Return the card with bfloat16 and the least memory that holds `needed_bytes`; None if none does."""
    fitting = [card for card in CARDS if card.bfloat16 and card.memory_bytes >= needed_bytes]
    return min(fitting, key=lambda card: card.memory_bytes, default=None)


def listed_cards() -> str:
    """Return the table of cards as text: name, memory on the data sheet, memory that a process gets."""
    lines = [f"{'card':14}{'data sheet':>12}{'usable':>12}"]
    lines += [f"{card.name:14}{f'{card.marketed_gb} GB':>12}{f'{card.gib:.2f} GiB':>12}" for card in CARDS]
    return "\n".join(lines)


def _key(name: str) -> str:
    return _WORDS.sub("", name.lower())
