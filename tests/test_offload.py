"""CPU offload of the embedding and of checkpointed layer inputs: the same bits and less device memory."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures_for_tests import config, recipe
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from qlora.adapter.adapted_linear import trainable_parameters
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import adapt
from qlora.data import Batch
from qlora.errors import RecipeError
from qlora.memory import measure
from qlora.memory.architecture import architecture
from qlora.memory.estimate import estimate
from qlora.memory.forecast import Forecast, forecast
from qlora.memory.live import LiveBytes
from qlora.memory.parts import PARTS
from qlora.memory.plan import changed
from qlora.memory.run_memory import _summary
from qlora.memory.workload import assumed
from qlora.model import offload
from qlora.model.checkpointing import checkpoint_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.model.offload import ActivationOffloader, HostEmbedding
from qlora.objective.causal_lm import loss_sum
from qlora.objective.checks import check_head
from qlora.objective.step import accumulate
from qlora.recipe import Recipe
from qlora.runtime.fake import representing_cuda
from qlora.training.run_folder import check_output, claim

LAYERS, ROWS, TOKENS, HIDDEN = 5, 4, 32, 64
INPUT_BYTES = ROWS * TOKENS * HIDDEN * 4


def model_of(architecture: str, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture, num_hidden_layers=LAYERS, **settings))
    adapt(model, LoraSpec(rank=4, targets="all-linear", dropout=0.1))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return use_fused_layers(model).train()


def batch_of(seed: int) -> Batch:
    ids = torch.randint(0, 512, (ROWS, TOKENS), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.clone(), None, tokens=ids.numel(), supervised=ROWS * (TOKENS - 1))


def pass_over(model: nn.Module) -> list[Tensor]:
    """Return the loss of a step of two micro-batches, and all gradients."""
    model.zero_grad()
    loss = accumulate(model, [batch_of(1), batch_of(2)], seed=3, step=0).sum
    gradients = [parameter.grad for parameter in trainable_parameters(model).values()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [loss, *(gradient.clone() for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("layers", [LAYERS, 3, 1])
def test_a_step_with_inputs_on_the_host_is_the_same_to_the_bit(architecture: str, layers: int) -> None:
    model = model_of(architecture)
    mlps = 1 if architecture in ("llama", "qwen3") and layers < LAYERS else 0
    checkpoint_layers(model, layers, mlps)
    plain = pass_over(model)
    checkpoint_layers(model, layers, mlps, offload=True)
    for _ in range(2):
        assert all(map(torch.equal, pass_over(model), plain))


def most_live(model: nn.Module) -> dict[str, int]:
    """Return the peak live bytes of each phase of a pass, without those in host memory."""
    pass_over(model)  # creates the gradients
    with LiveBytes() as live:
        accumulate(model, [batch_of(1)], seed=3, step=0)
    return live.trace().phases()


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_inputs_leave_the_device_and_return_one_layer_ahead(architecture: str) -> None:
    model = model_of(architecture)
    checkpoint_layers(model)
    kept = most_live(model)
    checkpoint_layers(model, offload=True)
    left = most_live(model)
    assert kept["loss"] - left["loss"] == (LAYERS - 1) * INPUT_BYTES  # the last layer's input stays
    assert kept["backward"] - left["backward"] >= (LAYERS - 4) * INPUT_BYTES  # the next one is loading


def test_inputs_without_a_backward_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    shelves = []
    put = ActivationOffloader._put

    def noted(self: ActivationOffloader, tensor: Tensor) -> Any:
        shelves.append(self)
        return put(self, tensor)

    monkeypatch.setattr(ActivationOffloader, "_put", noted)
    model = model_of("llama")
    checkpoint_layers(model, offload=True)
    loss = loss_sum(model, batch_of(1))
    assert len(shelves) == LAYERS
    assert shelves[0]._last() is not None
    del loss
    gc.collect()
    assert shelves[0]._last() is None
    expected = model_of("llama")
    checkpoint_layers(expected)
    assert all(map(torch.equal, pass_over(model), pass_over(expected)))


def test_the_end_of_every_copy_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward that stops half way waits too: a running copy would overwrite memory that was released and reused."""
    begun: list[object] = []
    waited: list[object] = []

    def copy(to: Tensor, source: Tensor) -> object:
        to.copy_(source)
        begun.append(object())
        return begun[-1]

    monkeypatch.setattr(offload, "_copy", copy)
    monkeypatch.setattr(offload, "_wait_for", lambda copied, device: waited.append(copied))
    model = model_of("llama")
    checkpoint_layers(model, offload=True)
    pass_over(model)
    assert len(begun) == 2 * (LAYERS + LAYERS - 1)  # all out, and all but the last layer's back
    assert set(begun) == set(waited)
    loss = loss_sum(model, batch_of(1))
    upper = [parameter for name, parameter in model.named_parameters() if ".4." in name and "lora_b" in name]
    torch.autograd.grad(loss, upper)
    assert set(begun) != set(waited)
    del loss
    gc.collect()
    assert set(begun) == set(waited)


def test_a_second_backward_can_use_the_inputs_again() -> None:
    model = model_of("llama")
    checkpoint_layers(model, offload=True)
    loss = loss_sum(model, batch_of(1))
    parameters = list(trainable_parameters(model).values())
    first, second = (torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_an_embedding_on_the_host_gives_its_rows() -> None:
    weight = torch.randn(90, 8, dtype=torch.bfloat16)
    ids = torch.tensor([[3, 0, 89], [3, 7, 1]])
    embedding = HostEmbedding(nn.Parameter(weight), torch.device("cpu"))
    assert torch.equal(embedding(ids), F.embedding(ids, weight))
    assert not list(embedding.parameters())
    assert not embedding.state_dict()


def with_base(made: Recipe, **changes: Any) -> Recipe:
    return made.model_copy(update={"base": made.base.model_copy(update=changes)})


def test_a_base_keeps_its_embedding_on_the_host(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama")
    plain = load_base(made.base)
    with representing_cuda():
        model = load_base(with_base(made, embedding="host").base)
    assert isinstance(model.get_input_embeddings(), HostEmbedding)
    assert torch.equal(loss_sum(model, batch_of(1)), loss_sum(plain, batch_of(1)))
    assert not isinstance(
        load_base(with_base(made, embedding="host").base).get_input_embeddings(), HostEmbedding
    )


def test_a_shared_embedding_stays(tmp_path: Path) -> None:
    made = with_base(recipe(tmp_path, "qwen2"), embedding="host")
    with representing_cuda(), pytest.raises(RecipeError, match=r"base\.embedding: .* Qwen2.* shares it"):
        load_base(made.base)


def test_a_model_that_needs_the_ids_on_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Expected all tensors to be on the same device\nand so on")

    monkeypatch.setattr(model.get_decoder(), "forward", fails)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="and so on"):
        check_head(model)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    model.set_input_embeddings(HostEmbedding(embedding.weight, torch.device("cpu")))  # type: ignore[operator]
    with pytest.raises(
        RecipeError, match=r"base\.embedding: Llama.* remove this key \(Expected all .* device\)$"
    ):
        check_head(model)


def foreseen(made: Recipe, *, cuda: bool = True) -> Forecast:
    return forecast(made, assumed(made), architecture(made, cuda=cuda), cuda=cuda)


def test_forecasts_subtract_offloaded_tensors(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=9, training={"micro_batch_size": 4, "global_batch_size": 4})
    offloaded = changed(made, activation_offloading=True)
    kept, left, host = (foreseen(one) for one in (made, offloaded, with_base(made, embedding="host")))
    parts, less = kept.trace.peak()[1], host.trace.peak()[1]
    table = 512 * HIDDEN * 4  # in fp32
    assert parts["base_unquantized"] - less["base_unquantized"] == table
    others = parts.keys() - {"base_unquantized", "allocator_slack"}
    assert all(less[part] == parts[part] for part in others)
    row = 4 * 64 * HIDDEN * 4
    slack = list(PARTS).index("allocator_slack")
    most, least = (np.delete(one.trace.parts, slack, axis=1).sum(axis=1).max() for one in (kept, left))
    assert (9 - 3) * row <= most - least <= (9 - 2) * row
    assert host.host_bytes == table
    assert left.host_bytes == 9 * row
    here, there = (foreseen(one, cuda=False).trace for one in (made, offloaded))
    assert (here.parts == there.parts).all()  # on a CPU, device memory is host memory


def test_a_host_with_too_little_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_base(recipe(tmp_path, "llama"), embedding="host")
    cpu = torch.device("cpu")
    assert "of host memory" in _summary(foreseen(made), cpu)
    assert "is free" not in _summary(foreseen(made), cpu)
    monkeypatch.setattr(measure, "free_bytes", lambda device: 2**16)
    assert "of host memory, but only 0.0625 MiB is free: remove" in _summary(foreseen(made), cpu)


@pytest.mark.slow
def test_both_offloads_are_advised(tmp_path: Path) -> None:
    found = {}
    for name in ("llama", "qwen2"):  # qwen2's head shares its embedding
        made = recipe(
            tmp_path,
            name,
            layers=9,
            training={"micro_batch_size": 4, "global_batch_size": 4, "device": "auto"},
            data={"max_length": 256},
            adapter={"rank": 2},
        )
        whole = estimate(made).needed_bytes
        found[name] = [change.settings for change in estimate(made, whole - 2**15).changes]
    assert ("training.activation_offloading=true",) in found["llama"]
    assert ("base.embedding=host",) in found["llama"]
    assert ("training.activation_offloading=true",) in found["qwen2"]
    assert ("base.embedding=host",) not in found["qwen2"]


def test_a_run_can_be_resumed_with_or_without_offload(tmp_path: Path) -> None:
    made = recipe(tmp_path / "model", "llama", data={"held_out": 0})
    claim(made, tmp_path / "run", resume=False, fresh=False)
    offloaded = changed(made, activation_offloading=True)
    assert check_output(with_base(offloaded, embedding="host"), tmp_path / "run", resume=True, fresh=False)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("layers", [LAYERS, 3])
def test_a_step_on_a_gpu_is_the_same_to_the_bit(
    layers: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies are so slow that code that does not wait for them reads or overwrites wrong data."""
    copy, gpu = offload._copy, device == "cuda"

    def slowly(to: Tensor, source: Tensor) -> Any:
        if gpu:
            with torch.cuda.stream(offload._stream(torch.device("cuda", 0))):
                torch.cuda._sleep(20_000_000)  # in cycles; about 10 ms
        return copy(to, source)

    monkeypatch.setattr(offload, "_copy", slowly)
    model = model_of("llama").to(device)
    checkpoint_layers(model, layers)
    plain = pass_over(model)
    checkpoint_layers(model, layers, offload=True)
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    model.set_input_embeddings(HostEmbedding(embedding.weight, embedding.weight.device))  # type: ignore[operator]
    for _ in range(3):
        assert all(map(torch.equal, pass_over(model), plain))
