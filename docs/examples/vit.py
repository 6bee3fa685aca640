"""A vision transformer that learns to tell horizontal, vertical and diagonal stripes, through its attention alone."""

import tempfile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

import qlora


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Return noisy images [count, 1, 16, 16] and the direction of their stripes, 0 to 2."""
    kind = torch.randint(0, 3, (count,))
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = torch.stack([y, x, x + y])[kind]
    phase = torch.rand(count, 1, 1) * 6.3
    return (torch.sin(along * 1.5 + phase) + 0.3 * torch.randn(count, 16, 16))[:, None], kind


def build() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=4,
        num_channels=1, num_labels=3, initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def accuracy(model: torch.nn.Module) -> float:
    torch.manual_seed(1)
    images, kinds = stripes(300)
    with torch.no_grad():
        return float((model(pixel_values=images).logits.argmax(-1) == kinds).float().mean())


model = build()
before = accuracy(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="attention"))
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=5e-3)
for _ in range(80):
    images, kinds = stripes(32)
    optimizer.zero_grad()
    F.cross_entropy(model(pixel_values=images).logits, kinds).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)
    model = qlora.load_adapter(build(), folder)
after = accuracy(model)
merged = accuracy(qlora.merge_adapter(model))
assert after > 0.9
assert merged == after
print(f"accuracy on new images: {before:.0%} before, {after:.0%} after, {merged:.0%} merged")
