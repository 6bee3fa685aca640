"""A character and a style for a diffusion UNet, trained apart, composed by weight, and read by diffusers (needs it)."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F

import qlora

y, x = torch.meshgrid(torch.linspace(-1, 1, 16), torch.linspace(-1, 1, 16), indexing="ij")
CHARACTER = torch.where(((x**2 + y**2).sqrt() - 0.6).abs() < 0.2, 1.0, -1.0)[None]  # a ring
STYLE = torch.sin(8 * (x + y))[None]  # stripes
WORDS = torch.randn(
    1, 4, 16, generator=torch.Generator().manual_seed(1)
)  # the prompt, as a text encoder gives it
scheduler = DDPMScheduler(num_train_timesteps=1000)


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=4, attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
    ).eval()  # fmt: skip


def noise_error(unet: torch.nn.Module, image: Tensor, count: int = 8) -> Tensor:
    """Return the mean squared error of the predicted noise (Ho et al. 2020, equation 14)."""
    noise, times = torch.randn(count, *image.shape), torch.randint(0, 1000, (count,))
    noisy = scheduler.add_noise(image.expand_as(noise), noise, times)
    return F.mse_loss(unet(noisy, times, WORDS.expand(count, -1, -1)).sample, noise)


@torch.no_grad()
def error(unet: torch.nn.Module, image: Tensor) -> float:
    torch.manual_seed(1)
    return float(noise_error(unet, image, 64))


@torch.no_grad()
def predicted(unet: torch.nn.Module) -> Tensor:
    return unet(CHARACTER[None], torch.tensor([500]), WORDS).sample


with tempfile.TemporaryDirectory() as folder:
    for name, image in (("character", CHARACTER), ("style", STYLE)):
        unet = build()
        before = error(unet, image)
        qlora.adapt(
            unet, qlora.LoraSpec(rank=8, alpha=16, targets=["to_q", "to_k", "to_v", "to_out.0", "conv1"])
        )
        optimizer = torch.optim.AdamW(qlora.trainable_parameters(unet).values(), lr=5e-3)
        for _ in range(40):
            optimizer.zero_grad()
            noise_error(unet, image).backward()
            optimizer.step()
        qlora.save_adapter(unet, Path(folder) / name, diffusers="unet")
        print(f"{name}: error of the predicted noise {before:.2f} before, {error(unet, image):.2f} after")

    command = "adapter compose character:0.7 style:0.5 --to both --diffusers unet"
    subprocess.run(
        [sys.executable, "-m", "qlora", *command.split()], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    ours = predicted(qlora.load_adapter(build(), Path(folder) / "both"))
    theirs, alone = build(), build()
    for name in ("character", "style"):
        theirs.load_lora_adapter(f"{folder}/{name}", prefix="unet", adapter_name=name, use_safetensors=True)
    theirs.set_adapters(["character", "style"], [0.7, 0.5])
    alone.load_lora_adapter(f"{folder}/both", prefix="unet", use_safetensors=True)

scale = (ours - predicted(build())).norm()
mixed, read = ((predicted(other) - ours).norm() / scale for other in (theirs, alone))
assert mixed < 1e-2
assert read < 1e-2
print(f"both: diffusers' own mixture differs by {mixed:.0e} of the effect, the composed file by {read:.0e}")
