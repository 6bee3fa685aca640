"""The remark about adapters that PEFT drops is true, and is made for no other model."""

from pathlib import Path

import pytest
import torch
from architectures_for_tests import config
from torch import nn
from transformers import AutoModelForCausalLM

from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.peft_drops import peft_drops

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(Found missing|Already found).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning"),
]


@pytest.mark.parametrize(
    ("architecture", "dropped"), [("glm4_moe", True), ("afmoe", True), ("qwen2_moe", False), ("olmoe", False)]
)
def test_peft_drops_what_the_remark_names(architecture: str, dropped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config(architecture, num_hidden_layers=2))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def base() -> nn.Module:
        fresh = AutoModelForCausalLM.from_config(config(architecture, num_hidden_layers=2))
        fresh.load_state_dict(weights)
        return fresh.eval()

    adapt(model, LoraSpec(rank=2, targets="all-linear", dtype=torch.float32))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_b)
    save_adapter(model, tmp_path)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        live = model.eval()(ids).logits
        ours = load_adapter(base(), tmp_path).eval()(ids).logits
        theirs = peft.PeftModel.from_pretrained(base(), tmp_path)(ids).logits
    torch.testing.assert_close(ours, live)
    assert (bool((theirs - live).abs().max() > 0.01), bool(peft_drops(model))) == (dropped, dropped)
    if dropped:
        assert "layers.0" in peft_drops(model)[0]


def test_no_remark_if_no_such_layer_is_adapted() -> None:
    model = AutoModelForCausalLM.from_config(config("glm4_moe", num_hidden_layers=2))
    assert not peft_drops(adapt(model, LoraSpec(rank=2, targets=["q_proj"])))
