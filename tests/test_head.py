"""The output head: scaling and capping of logits are known for every architecture, or the model is refused."""

from collections.abc import Callable

import architectures_for_tests as small
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.architectures import tiny
from qlora.adapter import LoraSpec, adapt
from qlora.data import Batch
from qlora.errors import ModelError
from qlora.model.head import head_of
from qlora.objective.causal_lm import loss_sum
from qlora.objective.checks import check_head

SCALED = (
    "falcon_h1",
    "recurrent_gemma",
    "xlstm",
    "cohere",
    "granitemoe",
    "hyperclovax",
    "minicpm3",
    "nanochat",
)
"""architectures that scale or cap their logits"""
ALL = sorted(small.ARCHITECTURES | small.LEAKY | small.APART)


def build(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small.config(architecture), dtype=dtype)
    model.config.use_cache = False
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def assert_head_known(architecture: str) -> None:
    """Compare the loss of the head times 12 with the loss of the model's own logits."""
    model = build(architecture)
    head_of(model).weight.mul_(12)
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, ids.clone(), None, tokens=18, supervised=16)
    logits = model(input_ids=ids, use_cache=False).logits.double()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum(model, batch).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", SCALED)
def test_scales_and_caps_of_the_logits_are_known(architecture: str) -> None:
    assert_head_known(architecture)


@pytest.mark.parametrize("divisor", [4.0, 1.0])
def test_the_divisor_of_inkling_is_known(divisor: float) -> None:
    pytest.importorskip("transformers.models.inkling")
    torch.manual_seed(0)
    config = tiny.config("inkling_text", logits_mup_width_multiplier=divisor)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert head_of(model).logit_scale == 1 / divisor
    check_head(model)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL)
def test_the_head_of_every_architecture_is_known(architecture: str) -> None:
    assert_head_known(architecture)
    for dtype in (torch.float32, torch.bfloat16):
        check_head(build(architecture, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.02,
        lambda logits: 50 * (logits / 50).tanh(),
        lambda logits: logits.clamp(-30, 30),
    ],
    ids=["factor", "cap", "clamp"],
)
def test_an_unknown_change_of_small_logits_is_refused(
    change: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    model = build("llama", dtype)
    before = head_of(model).weight.clone()
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))
    with pytest.raises(ModelError, match=r"LlamaForCausalLM changes its logits"):
        check_head(model)
    assert torch.equal(head_of(model).weight, before)  # the check enlarges it


def test_an_adapter_on_the_head_is_refused_with_its_name() -> None:
    model = AutoModelForCausalLM.from_config(small.config("llama", num_hidden_layers=1))
    adapt(model, LoraSpec(rank=2, targets=["lm_head", "q_proj"]))
    with pytest.raises(
        ModelError, match=r"adapter.targets: lm_head is the output head .*train_modules=\[lm_head\]"
    ):
        head_of(model)
