"""A CLIP that learns which caption belongs to which image, through the attention of both of its encoders."""

import tempfile

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

import qlora


def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Return images [count, 3, 16, 16] with one colored quarter, and captions [count, 4]: start, color, place, end."""
    color, place = torch.randint(0, 3, (2, count))
    images = 0.1 * torch.randn(count, 3, 16, 16)
    for image, channel, quarter in zip(images, color, place, strict=True):
        top, left = 8 * (int(quarter) // 2), 8 * (int(quarter) % 2)
        image[int(channel), top : top + 8, left : left + 8] += 2
    ends = torch.ones(count, dtype=torch.long)
    return images, torch.stack([ends, 2 + color, 5 + place, 9 * ends], dim=1)


def build() -> CLIPModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    text = {**sizes, "vocab_size": 10, "max_position_embeddings": 4, "eos_token_id": 9, "bos_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def matched(model: torch.nn.Module) -> float:
    """Return the share of images for which the right one of all nine captions scores highest."""
    torch.manual_seed(1)
    images, captions = pairs(200)
    every = captions.unique(dim=0)
    with torch.no_grad():
        best = every[model(input_ids=every, pixel_values=images).logits_per_image.argmax(1)]
    return float((best == captions).all(1).float().mean())


model = build()
before = matched(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="attention"))
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=5e-3)
for _ in range(150):
    images, captions = pairs(32)
    every, right = captions.unique(dim=0, return_inverse=True)
    optimizer.zero_grad()
    F.cross_entropy(model(input_ids=every, pixel_values=images).logits_per_image, right).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)
    model = qlora.load_adapter(build(), folder)
after = matched(model)
merged = matched(qlora.merge_adapter(model))
assert after > 0.8
assert merged == after
print(f"images matched with their caption: {before:.0%} before, {after:.0%} after, {merged:.0%} merged")
