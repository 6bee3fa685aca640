"""A GPT-2 that learns to repeat words; its linears are Conv1D, which store their weight as [in, out]."""

import tempfile

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import qlora


def texts(count: int) -> Tensor:
    """Return texts [count, 16] in which each word from the fourth on is the word three places before it."""
    start = torch.randint(3, 30, (count, 3))
    return start.repeat(1, 6)[:, :16]


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=30, n_positions=16, initializer_range=0.1, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def accuracy(model: torch.nn.Module) -> float:
    torch.manual_seed(1)
    ids = texts(200)
    with torch.no_grad():
        return float((model(input_ids=ids).logits[:, 2:-1].argmax(-1) == ids[:, 3:]).float().mean())


model = build()
before = accuracy(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="all-linear"))
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=5e-3)
for _ in range(200):
    ids = texts(32)
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)
    model = qlora.load_adapter(build(), folder)
after = accuracy(model)
merged = accuracy(qlora.merge_adapter(model))
assert after > 0.8
assert merged == after
print(f"repeated words: {before:.0%} right before, {after:.0%} after, {merged:.0%} merged")
