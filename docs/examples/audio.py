"""A wav2vec 2.0 that learns to tell a rising tone from a falling one and from noise, through its attention alone."""

import tempfile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

import qlora


def sounds(count: int) -> tuple[Tensor, Tensor]:
    """Return sounds [count, 1600] and their kinds: 0 rises, 1 falls, 2 is noise."""
    kind = torch.randint(0, 3, (count,))
    time = torch.linspace(0, 1, 1600)
    start = 40 + 40 * torch.rand(count, 1)
    rising, falling = (torch.sin(6.3 * (start * time + sign * 60 * time**2)) for sign in (0.5, -0.5))
    waves = torch.stack([rising, falling, torch.randn(count, 1600)])
    return waves[kind, torch.arange(count)] + 0.1 * torch.randn(count, 1600), kind


def build() -> Wav2Vec2ForSequenceClassification:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, conv_dim=(32, 32),
        conv_kernel=(10, 4), conv_stride=(5, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4, num_labels=3, classifier_proj_size=32, initializer_range=0.1,
    )  # fmt: skip
    return Wav2Vec2ForSequenceClassification(config).eval()


def accuracy(model: torch.nn.Module) -> float:
    torch.manual_seed(1)
    waves, kinds = sounds(150)
    with torch.no_grad():
        return float((model(waves).logits.argmax(-1) == kinds).float().mean())


model = build()
before = accuracy(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="attention"))
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=5e-3)
for _ in range(80):
    waves, kinds = sounds(24)
    optimizer.zero_grad()
    F.cross_entropy(model(waves).logits, kinds).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)
    model = qlora.load_adapter(build(), folder)
after = accuracy(model)
merged = accuracy(qlora.merge_adapter(model))
assert after > 0.8
assert merged == after
print(f"accuracy on new sounds: {before:.0%} before, {after:.0%} after, {merged:.0%} merged")
