"""Fake tensors exist only inside their context, take the place of GPU tensors there, and leave nothing behind."""

import pytest
import torch
from torch import nn

from qlora.runtime.device import on_cuda
from qlora.runtime.fake import FakeTensors, is_fake, real_values


def test_tensors_are_fake_and_on_a_gpu_only_inside_the_context() -> None:
    real = torch.ones(2)
    with FakeTensors(cuda=True).made() as fake:
        for tensor in (torch.empty(2), fake(real)):
            assert is_fake(tensor)
            assert on_cuda(tensor)
        with real_values():
            assert int(torch.ones(3).sum()) == 3
    with pytest.raises(KeyError), FakeTensors(cuda=True).made():
        raise KeyError
    assert not is_fake(torch.empty(2))
    assert not on_cuda(real)
    with FakeTensors(cuda=False).made():
        assert not on_cuda(torch.empty(2))


def test_fake_parameters_are_converted_and_others_as_before() -> None:
    real = nn.Linear(2, 2)
    with FakeTensors(cuda=False).made():
        model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, dtype=torch.bfloat16))
        before = model[0].weight
        model.to(torch.float32)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(is_fake(parameter) for parameter in model.parameters())
        assert model[0].weight is before, "it has the dtype already"
    assert real.to(torch.bfloat16).weight.dtype == torch.bfloat16
