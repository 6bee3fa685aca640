"""Compare the held-out loss and the bytes per weight of a base in float32 and in NF4.

    python benchmarks/nf4_cost.py TEXT.jsonl [--model bundled/base]

TEXT.jsonl holds plain text in the field `text`. The loss is in nats per token. Prints a Markdown table.
"""

import argparse
from itertools import chain
from typing import Any

from qlora.data import Batches, load_dataset
from qlora.model.load import load_base, load_tokenizer
from qlora.objective.step import evaluate
from qlora.quantization.nf4 import is_nf4, weight_bytes
from qlora.recipe import Base, Data

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"quantization": "none", "compute_dtype": "float32"},
    "NF4": {"quantization": "nf4", "double_quant": False, "compute_dtype": "float32"},
    "NF4, double quantization": {"quantization": "nf4", "compute_dtype": "float32"},
    "NF4, double quantization, blocks of 256": {
        "quantization": "nf4",
        "block_size": 256,
        "compute_dtype": "float32",
    },
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("text", help="JSON Lines with the field `text`")
    parser.add_argument("--model", default="bundled/base")
    arguments = parser.parse_args()
    data = Data(source=arguments.text, format="completion", max_length=256, held_out=0)
    print("| base | held-out loss | bytes per linear weight |")
    print("|---|---:|---:|")
    for name, settings in VARIANTS.items():
        base = Base(model=arguments.model, **settings)
        dataset = load_dataset(data, load_tokenizer(base), seed=0)
        batches = Batches(
            dataset.train,
            micro_batch_size=8,
            global_batch_size=8,
            max_length=256,
            packing=False,
            pad_id=dataset.pad_id,
            seed=0,
        ).evaluation()
        model = load_base(base)
        total, tokens = evaluate(model, batches)
        linears = list(chain.from_iterable(layer.modules() for layer in model.model.layers))
        linears = [module for module in linears if hasattr(module, "in_features")]
        weights = sum(module.in_features * module.out_features for module in linears)
        stored = sum(weight_bytes(m) if is_nf4(m) else m.weight.nbytes for m in linears)
        print(f"| {name} | {total.sum.item() / tokens:.4f} | {stored / weights:.4f} |")
    print(f"\n{tokens:,} tokens")


if __name__ == "__main__":
    main()
