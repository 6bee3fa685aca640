"""Adapters on networks of every kind: they learn, come back from their folder, and merge into the same function.

The models are random and tiny. Each memorises a few samples through its attention projections alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora import merge_adapter
from qlora.adapter import (
    LoraSpec,
    adapt,
    load_adapter,
    lora_layers,
    save_adapter,
    select,
    trainable_parameters,
)
from qlora.adapter.algebra import compose as composing
from qlora.adapter.algebra import tensors
from qlora.errors import ModelError

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}


class Network(NamedTuple):
    """A random tiny model, and its output and loss on a few fixed samples."""

    build: Callable[[], nn.Module]
    output: Callable[[nn.Module], Tensor]
    targets: Tensor
    layers: int
    """number of layers that `attention` selects"""
    lr: float = 3e-2

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()  # no dropout, no running statistics

    def loss(self, model: nn.Module) -> Tensor:
        output = self.output(model)
        if self.targets.is_floating_point():
            return F.mse_loss(output, self.targets)
        return F.cross_entropy(output.flatten(0, -2), self.targets.flatten())


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def ids(*shape: int, vocabulary: int = 20) -> Tensor:
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(6))


def vit() -> Network:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=4)
    images = numbers(4, 3, 16, 16)
    return Network(
        lambda: ViTForImageClassification(config), lambda m: m(pixel_values=images).logits, torch.arange(4), 8
    )


def bert() -> Network:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**SMALL, vocab_size=20, num_labels=3)
    sentences = ids(6, 5)
    return Network(
        lambda: BertForSequenceClassification(config),
        lambda m: m(input_ids=sentences).logits,
        torch.arange(6) % 3,
        8,
    )


def clip() -> Network:
    from transformers import CLIPConfig, CLIPModel

    small = {**SMALL, "initializer_range": 0.02}
    text = {**small, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19, "pad_token_id": 0}
    config = CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    images, captions = numbers(4, 3, 16, 16), ids(4, 5)

    def output(model: nn.Module) -> Tensor:
        return model(input_ids=captions, pixel_values=images).logits_per_image  # type: ignore[no-any-return]

    return Network(lambda: CLIPModel(config), output, torch.arange(4), 16)


def wav2vec2() -> Network:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **SMALL, conv_dim=(16, 16), conv_kernel=(8, 4), conv_stride=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, classifier_proj_size=16,
    )  # fmt: skip
    sounds = numbers(3, 800)
    return Network(
        lambda: Wav2Vec2ForSequenceClassification(config), lambda m: m(sounds).logits, torch.arange(3), 8
    )


def whisper() -> Network:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=20, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, init_std=0.2,
    )  # fmt: skip
    sounds, words = numbers(2, 8, 32), ids(2, 4)

    def output(model: nn.Module) -> Tensor:
        return model(input_features=sounds, decoder_input_ids=words).logits  # type: ignore[no-any-return]

    return Network(lambda: WhisperForConditionalGeneration(config), output, ids(2, 4).flip(1), 12)


def gpt2() -> Network:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=20,
        n_positions=16,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    text = ids(2, 7)
    return Network(
        lambda: GPT2LMHeadModel(config), lambda m: m(input_ids=text[:, :-1]).logits, text[:, 1:], 4
    )


def unet() -> Network:
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 4, "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 16,
    }  # fmt: skip
    images, words, times = numbers(2, 4, 8, 8), numbers(2, 5, 16), torch.tensor([10, 500])
    return Network(
        lambda: UNet2DConditionModel(**config),
        lambda m: m(images, times, words).sample,
        numbers(2, 4, 8, 8).flip(0) * 0.5,
        36,
        lr=1e-2,  # with 3e-2 the loss goes up and down, on each CPU in another way
    )


def dit() -> Network:
    pytest.importorskip("diffusers")
    from diffusers import DiTTransformer2DModel

    def build() -> nn.Module:
        return DiTTransformer2DModel(
            num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            patch_size=2, norm_num_groups=4, num_embeds_ada_norm=10,
        )  # fmt: skip

    images, times = numbers(2, 4, 8, 8), torch.tensor([1, 5])
    return Network(
        build,
        lambda m: m(images, timestep=times, class_labels=times).sample,
        numbers(2, 4, 8, 8).flip(0) * 0.5,
        8,
    )


def sd3() -> Network:
    pytest.importorskip("diffusers")
    from diffusers import SD3Transformer2DModel

    def build() -> nn.Module:
        return SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
            pos_embed_max_size=8,
        )  # fmt: skip

    images, words, pooled = numbers(2, 4, 8, 8), numbers(2, 5, 16), numbers(2, 12)

    def output(model: nn.Module) -> Tensor:
        return model(images, words, pooled, torch.tensor([10, 500])).sample  # type: ignore[no-any-return]

    return Network(build, output, numbers(2, 4, 8, 8).flip(0) * 0.5, 15)


NETWORKS: list[Any] = [vit, bert, wav2vec2, gpt2]
SLOW: list[Any] = [clip, whisper, unet, dit, sd3]


def train(network: Network, steps: int, **settings: Any) -> tuple[nn.Module, list[float]]:
    model = adapt(network.model(), LoraSpec(**{"rank": 8, "alpha": 16, "targets": "attention", **settings}))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=network.lr, weight_decay=0)
    curve = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network.loss(model)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return model, curve


@pytest.mark.parametrize(
    "kind",
    [*NETWORKS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)],
    ids=lambda k: k.__name__,
)
def test_it_learns_comes_back_and_merges(kind: Callable[[], Network], tmp_path: Path) -> None:
    network = kind()
    assert len(select(network.model(), "attention")) == network.layers
    model, curve = train(network, 40)
    with torch.no_grad():
        plain, trained = network.output(network.model()), network.output(model)
    effect = (trained - plain).norm()
    assert network.loss(model) < 0.5 * curve[0], f"{curve[0]:.3f} to {curve[-1]:.3f}"
    save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        again = network.output(load_adapter(network.model(), tmp_path / "adapter"))
        assert torch.equal(again, trained)
        merged = network.output(merge_adapter(model))
    assert not lora_layers(model)
    assert (merged - trained).norm() < 0.01 * effect
    torch.manual_seed(1)
    with pytest.raises(ModelError, match="differ in weights"):
        load_adapter(network.build(), tmp_path / "adapter")


def pipeline(mixin: Any, component: str, model: nn.Module) -> Any:
    """Return a pipeline of diffusers that has this model and no text encoders."""
    from diffusers import DiffusionPipeline

    class Unet(DiffusionPipeline, mixin):
        def __init__(self, unet: Any, text_encoder: Any = None) -> None:
            super().__init__()
            self.register_modules(unet=unet, text_encoder=text_encoder)

    class Transformer(DiffusionPipeline, mixin):
        def __init__(self, transformer: Any, text_encoder: Any = None, text_encoder_2: Any = None) -> None:
            super().__init__()
            self.register_modules(
                transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2
            )

    return (Unet if component == "unet" else Transformer)(model)


def randomised(network: Network, seed: int, **settings: Any) -> nn.Module:
    """Return the network with an adapter of random numbers in fp32."""
    spec = LoraSpec(**{"rank": 3, "alpha": 7, "dtype": torch.float32, **settings})
    model = adapt(network.model(), spec, seed=seed)
    torch.manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b, std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "component", "targets"),
    [
        (unet, "unet", "attention"),
        (unet, "unet", ["to_q", "to_v", "conv1", "conv_shortcut", "proj_in"]),
        (sd3, "transformer", "attention"),
    ],
)
def test_diffusers_loader_reads_our_file(
    kind: Callable[[], Network], component: str, targets: Any, tmp_path: Path
) -> None:
    from diffusers.loaders import SD3LoraLoaderMixin, StableDiffusionLoraLoaderMixin

    network = kind()
    patterns = {"rank_pattern": {"to_v": 5}, "alpha_pattern": {"to_q": 1.5}, "scaling": "alpha/sqrt(rank)"}
    ours = randomised(network, 1, targets=targets, **patterns)
    save_adapter(ours, tmp_path, diffusers=component)
    mixin = StableDiffusionLoraLoaderMixin if component == "unet" else SD3LoraLoaderMixin
    pipe = pipeline(mixin, component, network.model())
    pipe.load_lora_weights(str(tmp_path))
    alone = network.model()
    alone.load_lora_adapter(str(tmp_path), prefix=component, use_safetensors=True)
    with torch.no_grad():
        wanted, plain = network.output(ours), network.output(network.model())
        assert (wanted - plain).norm() > 0.1 * plain.norm()
        for other in (getattr(pipe, component), alone):
            torch.testing.assert_close(network.output(other), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # diffusers adds the second adapter
def test_a_character_and_a_style_are_composed_by_weight(tmp_path: Path) -> None:
    """The composed adapter is the weighted sum of both updates, and diffusers' own mixture computes the same."""
    network = unet()
    weights = {"character": 0.8, "style": 0.6}
    save_adapter(randomised(network, 1, targets="attention"), tmp_path / "character", diffusers="unet")
    style = randomised(network, 2, targets=["to_q", "conv1"], rank=4)
    save_adapter(style, tmp_path / "style", diffusers="unet")
    mixed, _ = composing.compose([(tensors.read(tmp_path / name), weights[name]) for name in weights])
    tensors.write(mixed, tmp_path / "both", diffusers="unet")
    ours = load_adapter(network.model(), tmp_path / "both")
    theirs, again, summed = network.model(), network.model(), network.model()
    for name in weights:
        theirs.load_lora_adapter(str(tmp_path / name), prefix="unet", adapter_name=name, use_safetensors=True)
    theirs.set_adapters(list(weights), list(weights.values()))
    again.load_lora_adapter(str(tmp_path / "both"), prefix="unet", use_safetensors=True)
    with torch.no_grad():
        for name, weight in weights.items():
            for layer_name, layer in lora_layers(load_adapter(network.model(), tmp_path / name)).items():
                update = layer.merged_weight() - layer.base.weight
                summed.get_parameter(f"{layer_name}.weight").add_(weight * update)
        wanted = network.output(summed)
        assert (wanted - network.output(network.model())).norm() > 0.1 * wanted.norm()
        for other in (ours, theirs, again):
            torch.testing.assert_close(network.output(other), wanted, rtol=1e-4, atol=1e-4)


def test_what_diffusers_cannot_read_is_refused(tmp_path: Path) -> None:
    network = nn.ModuleDict({"words": nn.Embedding(4, 4), "up": nn.Linear(4, 4)})
    model = adapt(network, LoraSpec(targets=["words", "up"], rank=2))
    with pytest.raises(
        ModelError, match=r"diffusers reads A and B of .*, not words\.lora_embedding_A, words"
    ):
        save_adapter(model, tmp_path, diffusers="unet")
    assert not list(tmp_path.iterdir())


def test_an_adapter_whose_initialisation_changed_the_base_is_not_written_for_diffusers(
    tmp_path: Path,
) -> None:
    network = nn.ModuleDict({"up": nn.Linear(4, 4)})
    model = adapt(network, LoraSpec(targets=["up"], rank=2, init="pissa", dtype=torch.float32))
    with pytest.raises(ModelError, match=r"this base was changed by pissa .*qlora adapter export"):
        save_adapter(model, tmp_path, diffusers="unet")
    assert not list(tmp_path.iterdir())


def test_a_head_that_was_unfrozen_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    network = bert()
    model = adapt(network.model(), LoraSpec(rank=4, targets="attention"))
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=3e-2)
    for _ in range(10):
        optimizer.zero_grad()
        network.loss(model).backward()
        optimizer.step()
    assert not torch.equal(model.classifier.weight, network.model().classifier.weight)
    save_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = network.output(model)
        loaded = load_adapter(network.model(), tmp_path)
        assert torch.equal(network.output(loaded), wanted)
        torch.testing.assert_close(network.output(merge_adapter(loaded)), wanted, rtol=1e-3, atol=1e-3)
