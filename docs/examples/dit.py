"""A diffusion transformer (DiT) that learns to denoise two kinds of images through its attention (needs diffusers)."""

import tempfile

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

import qlora

y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
CLASSES = torch.stack([torch.sign(x), torch.sign(y)])[:, None]  # left and right; above and below
scheduler = DDPMScheduler(num_train_timesteps=1000)


def build() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=2,
    ).eval()  # fmt: skip


def noise_error(model: torch.nn.Module, count: int = 32) -> Tensor:
    """Return the mean squared error of the predicted noise (Ho et al. 2020, equation 14)."""
    kind, times = torch.randint(0, 2, (count,)), torch.randint(0, 1000, (count,))
    noise = torch.randn(count, 1, 8, 8)
    noisy = scheduler.add_noise(CLASSES[kind], noise, times)
    return F.mse_loss(model(noisy, timestep=times, class_labels=kind).sample, noise)


@torch.no_grad()
def error(model: torch.nn.Module) -> float:
    torch.manual_seed(1)
    return float(noise_error(model, 256))


model = build()
before = error(model)
qlora.adapt(model, qlora.LoraSpec(rank=8, alpha=16, targets="attention"))
optimizer = torch.optim.AdamW(qlora.trainable_parameters(model).values(), lr=1e-2)
for _ in range(200):
    optimizer.zero_grad()
    noise_error(model).backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(model, folder)
    model = qlora.load_adapter(build(), folder)
after = error(model)
merged = error(qlora.merge_adapter(model))
assert after < 0.8 * before
assert abs(merged - after) < 0.01 * before
print(f"error of the predicted noise: {before:.2f} before, {after:.2f} after, {merged:.2f} merged")
