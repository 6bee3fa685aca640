"""A sequence classifier with a new head: LoRA in the attention, and the head trained as a whole."""

import tempfile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

import qlora


def sentences(count: int) -> tuple[Tensor, Tensor]:
    """Return sentences of 12 words, and 1 for each that has the word 7 somewhere after the word 5."""
    ids = torch.randint(8, 40, (count, 12))
    label = torch.randint(0, 2, (count,))
    for row, positive in zip(ids, label, strict=True):
        first, second = torch.randperm(12)[:2].sort().values
        row[first], row[second] = (5, 7) if positive else (7, 5)
    return ids, label


def build() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        num_labels=2, initializer_range=0.1,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def accuracy(model: torch.nn.Module) -> float:
    torch.manual_seed(1)
    ids, labels = sentences(400)
    with torch.no_grad():
        return float((model(input_ids=ids).logits.argmax(-1) == labels).float().mean())


model = build()
before = accuracy(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="attention"))
model.classifier.requires_grad_(True)  # a head is new, so it is trained as a whole
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=5e-3)
for _ in range(200):
    ids, labels = sentences(32)
    optimizer.zero_grad()
    F.cross_entropy(model(input_ids=ids).logits, labels).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)  # with the head, because it was unfrozen
    model = qlora.load_adapter(build(), folder)
after = accuracy(model)
merged = accuracy(qlora.merge_adapter(model))
assert after > 0.9
assert merged == after
print(f"accuracy on new sentences: {before:.0%} before, {after:.0%} after, {merged:.0%} merged")
