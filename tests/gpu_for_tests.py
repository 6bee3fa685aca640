"""Checks of the package on a device. The tests run each one on a GPU, and on a CPU with the same code.

Tensors are bfloat16 and references fp64, unless a check says otherwise.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora.data import Batch, Example
from qlora.data.batches import collate
from qlora.errors import OutOfMemoryError
from qlora.inference.generate import answer
from qlora.inference.load import load_trained
from qlora.kernels import FusedOp, cross_entropy, gate, grouped, norm, rotary
from qlora.kernels.dispatch import numbers
from qlora.model.load import load_base, load_tokenizer
from qlora.model.varlen_attention import arguments, attend
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.causal_lm import hidden_states, loss_sum
from qlora.optim import Optimizer, paged
from qlora.quantization import nf4
from qlora.recipe import Recipe
from qlora.runtime.fake import representing_cuda
from qlora.training import train as loop
from qlora.training.profile import profile
from qlora.training.result import TrainResult
from qlora.training.session import Session

KERNELS: tuple[FusedOp, ...] = (
    gate.SILU_PRODUCT, gate.SILU_GRADIENTS, norm.NORMALIZE, norm.NORMALIZE_LATE, norm.NORMALIZE_GRADIENT,
    rotary.ROTATE, rotary.ROTATE_PAIRS, cross_entropy.LOSS, grouped.PRODUCT, grouped.OUTER, nf4.DEQUANTIZE,
)  # fmt: skip
RESUMED = 0.05
"""bound of the relative difference between the updates of a run on a GPU that was killed and of one that was not: flash
attention adds the gradients of queries in any order"""


def error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of `expected`."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def check_nf4(device: torch.device, rows: int, columns: int) -> None:
    """Codes and values are those of bitsandbytes to the bit, and values are those of the definition in fp64."""
    weight = numbers(torch.device("cpu"), torch.bfloat16, rows, columns).to(device)
    ours = nf4.quantize(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(ours.data.view(-1), packed.view(-1))
    assert torch.equal(ours.quant_state.absmax, state.absmax)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).long()
    inner = state.state2
    scales = inner.absmax.double().repeat_interleave(inner.blocksize)[: state.absmax.numel()]
    absmax = inner.code.double()[state.absmax.long()] * scales + state.offset.double()
    values = state.code.double()[codes] * absmax.repeat_interleave(64)[: codes.numel()]
    values = values.view(rows, columns)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        found = nf4.dequantize(ours, ours.quant_state, dtype)
        state.dtype = dtype
        assert torch.equal(found, bnb.dequantize_4bit(packed, state))
        torch.testing.assert_close(found.double(), values, rtol=tolerance, atol=1e-9)
    x = numbers(torch.device("cpu"), torch.bfloat16, 33, columns, seed=1).to(device).requires_grad_()
    y = nf4.frozen_linear(x, ours, ours.quant_state, None)
    gradient = numbers(torch.device("cpu"), torch.bfloat16, 33, rows, seed=2).to(device)
    y.backward(gradient)
    assert x.grad is not None
    assert error(y, x.double() @ values.T) < 0.01
    assert error(x.grad, gradient.double() @ values) < 0.01


def check_attention(
    device: torch.device, lengths: tuple[int, ...], head_dim: int, groups: int, window: int | None
) -> None:
    """Attention over documents, and its gradients, are those of each document alone in fp64."""
    total, heads = sum(lengths), 4
    shapes = [(1, count, total, head_dim) for count in (heads, heads // groups, heads // groups)]
    inputs = [
        numbers(torch.device("cpu"), torch.bfloat16, *shape, seed=seed).to(device).requires_grad_()
        for seed, shape in enumerate(shapes)
    ]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    given = arguments(lengths, device)
    ends, mask = given["document_ends"], given["attention_mask"]
    found, _ = attend(
        nn.Module(), *inputs, mask, sliding_window=window, document_lengths=lengths, document_ends=ends
    )
    places = torch.arange(total, device=device)
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    behind = places[:, None] - places[None]
    seen = (documents[:, None] == documents[None]) & (behind >= 0) & (behind < (window or total))
    q, k, v = exact[0], *(x.repeat_interleave(groups, dim=1) for x in exact[1:])
    scores = (q @ k.transpose(2, 3) / head_dim**0.5).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    assert error(found, expected) < 0.01
    gradient = numbers(torch.device("cpu"), torch.bfloat16, 1, total, heads, head_dim, seed=3).to(device)
    found.backward(gradient)
    expected.backward(gradient.double())
    for ours, right in zip(inputs, exact, strict=True):
        assert ours.grad is not None
        assert right.grad is not None
        assert error(ours.grad, right.grad) < 0.02


def packed(*documents: list[int]) -> Batch:
    """Return a batch of one row with these documents; all tokens but the first of each are trained."""
    examples = []
    for ids in documents:
        tokens = torch.tensor(ids, dtype=torch.int32)
        labels = tokens.clone()
        labels[0] = -100
        examples.append(Example(tokens.numpy(), labels.numpy(), ""))
    return collate([examples], pad_id=0, packed=len(examples) > 1)


def check_packing(device: torch.device, base: Path) -> None:
    """A packed row has the loss of its documents, and no document sees another."""
    model = load_base(Recipe.from_dict(recipe_dict(base, device, base)).base, device)
    documents = [[(7 * i + 3 * n) % 2000 + 5 for i in range(length)] for n, length in enumerate((40, 9, 23))]
    read_documents_if_apart(model)
    with torch.no_grad():
        alone = sum(float(loss_sum(model, packed(document))) for document in documents)
        together = float(loss_sum(model, packed(*documents)))
        assert abs(together - alone) < 5e-3 * alone
        states = hidden_states(model, packed(*documents))[0].view(sum(map(len, documents)), -1)
        other = hidden_states(model, packed([9] * 40, *documents[1:]))[0].view(states.shape)
    assert not torch.equal(states[:40], other[:40])
    assert torch.equal(states[40:], other[40:])


def recipe_dict(base: Path | str, device: torch.device, output: Path, **training: Any) -> dict[str, Any]:
    """Return a recipe that trains a small base on the bundled tickets, in bfloat16 on a GPU and in fp32 on a CPU."""
    return {
        "base": {"model": str(base), "compute_dtype": "float32" if device.type == "cpu" else "bfloat16"},
        "adapter": {"rank": 8, "targets": "all-linear", "dropout": 0.1},
        "data": {
            "source": "bundled/tickets/train.jsonl", "format": "messages", "max_length": 128, "limit": 24,
            "held_out": 4, "packing": True,
        },
        "training": {
            "max_steps": 8, "micro_batch_size": 2, "global_batch_size": 4, "samples": 0, "eval_every": None,
            "save_every": 2, "device": device.type, **training,
        },
        "optimizer": {"name": "paged_adamw_32bit", "lr": 1e-3},
        "tracking": {"wandb": {"mode": "disabled"}},
        "output": str(output),
    }  # fmt: skip


def trained(made: dict[str, Any], **how: Any) -> TrainResult:
    """Train the recipe to its end in this process."""
    return loop.train(Recipe.from_dict(made), terminal=False, **how)


def check_killed_run(device: torch.device, folder: Path) -> None:
    """A run that SIGKILL ends learns after its resume as one that ran through: the same bits on a CPU."""
    whole = trained(recipe_dict("bundled/base", device, folder / "whole", max_steps=12))
    assert whole.loss_before is not None
    assert whole.loss_after is not None
    assert whole.loss_after < 0.95 * whole.loss_before
    made = recipe_dict("bundled/base", device, folder / "killed", max_steps=12)
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(made))
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    }
    command = [sys.executable, "-c", _SLOW_TRAIN, "train", str(file), "--quiet"]
    with (folder / "stderr").open("w") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors)
        try:
            deadline = time.monotonic() + 200
            while not list((folder / "killed/checkpoints").glob("step-*/manifest.json")):
                assert process.poll() is None, (folder / "stderr").read_text()
                assert time.monotonic() < deadline, (folder / "stderr").read_text()
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    assert not (folder / "killed/result.json").exists()
    trained(made, resume=True)
    ours, theirs = (
        load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("killed", "whole")
    )
    assert ours.keys() == theirs.keys()
    if device.type == "cpu":
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in (name for name in ours if "lora_B" in name):  # B starts at zero, so it is the update
        assert error(ours[name], theirs[name]) < RESUMED, name


_SLOW_TRAIN = """
import time
from qlora.cli import main
from qlora.training import train

step = train.take_step
def slow(*arguments):
    time.sleep(0.3)  # so that the signal arrives before the end
    return step(*arguments)
train.take_step = slow
main()
"""


def check_generation(device: torch.device, base: Path, folder: Path) -> None:
    """A run's greedy answer has the likeliest token at each place, computed without a cache, in fp32."""
    made = recipe_dict(base, device, folder / "run", max_steps=2, save_every=None)
    made["base"]["compute_dtype"] = "float32"
    trained(made)
    result = load_trained(folder / "run", device=device.type)
    model, tokenizer = result.model, load_tokenizer(Recipe.from_dict(made).base)
    prompt = tokenizer("Once upon a time").input_ids
    text = answer(model, tokenizer, prompt, max_new_tokens=12)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            row = torch.tensor([ids], device=device)
            ids.append(int(model(input_ids=row).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def check_shortage(device: torch.device, base: Path, folder: Path) -> None:
    """A real allocation that fails ends the run with exit 6; it continues with a smaller micro-batch."""
    made = recipe_dict(base, device, folder / "short", max_steps=6)
    take_step = loop.take_step

    def short(session: Session, step: int, tracker: Any) -> int:
        if step == 3:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        return take_step(session, step, tracker)

    with patch.object(loop, "take_step", short):
        with pytest.raises(OutOfMemoryError, match=r"training\.micro_batch_size=1") as caught:
            trained(made)
    assert caught.value.exit_code == 6
    made["training"]["micro_batch_size"] = 1
    outcome = trained(made, resume=True)
    assert outcome.steps == outcome.total_steps == 6
    assert outcome.loss_after is not None
    assert outcome.loss_before is not None
    assert outcome.loss_after < outcome.loss_before


def check_forecast(model: str, device: torch.device, folder: Path, tokens: int, tolerance: float) -> None:
    """The forecast of a run is its measurement within `tolerance`: on a GPU, that of the driver.

    On a GPU the CUDA context is left out of both sides, because the forecast has one size for all cards.
    """
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 2 * tokens}) + "\n" for _ in range(4)))
    made = Recipe.load(
        model,
        [
            "base.init=synthetic", f"training.device={device.type}", f"data.source={rows}", "data.format=completion",
            "data.too_long=truncate", f"data.max_length={tokens}", "data.held_out=0", "training.micro_batch_size=1",
            "training.global_batch_size=1", "adapter.dropout=0",
        ],
    )  # fmt: skip
    content = profile(made, 2)
    forecast, measured = content["forecast"], content["measured"]
    sizes = [side["total_bytes"] - side["parts"].get("device_context", 0) for side in (forecast, measured)]
    if device.type == "cuda":
        assert measured["driver_bytes"]
        assert measured["reserved_bytes"] <= measured["driver_bytes"]
    assert abs(sizes[0] / sizes[1] - 1) < tolerance, sizes


def check_paging(device: torch.device) -> None:
    """States of a paged optimizer are in managed memory, and stay there when they are loaded."""
    shape = (1024, 128)
    names = [f"w{number}" for number in range(8)]
    values = {
        name: numbers(torch.device("cpu"), torch.bfloat16, *shape, seed=n) for n, name in enumerate(names)
    }
    optimizers = []
    for _ in range(2):
        params = {name: nn.Parameter(value.to(device)) for name, value in values.items()}
        optimizer = Optimizer(params, name="paged_adamw_32bit")
        for parameter in params.values():
            parameter.square().sum().backward()
        optimizer.step(1e-3)
        optimizers.append(optimizer)
    optimizers[1].load_state(optimizers[0].state())
    for optimizer in optimizers:
        large = [
            tensor for group in optimizer._groups for tensor in group.states.values()
            if tensor.numel() >= paged.MIN_SIZE
        ]  # fmt: skip
        assert large
        assert all(tensor.device.type == device.type for tensor in large)
        if device.type == "cuda":
            assert all(map(is_managed, large))
    one, other = (optimizer.state() for optimizer in optimizers)
    assert all(torch.equal(one[name], other[name]) for name in one)


def is_managed(tensor: Tensor) -> bool:
    """Return the driver's attribute of the memory (CU_POINTER_ATTRIBUTE_IS_MANAGED)."""
    value = ctypes.c_uint(0)
    status = ctypes.CDLL("libcuda.so.1").cuPointerGetAttribute(
        ctypes.byref(value), 8, ctypes.c_uint64(tensor.data_ptr())
    )
    assert status == 0
    return bool(value.value)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Every kernel passes its check on the device and runs; none falls back to plain torch.

    On a CPU it leaves out the dequantization, whose plain form bitsandbytes has for GPUs alone.
    """
    for work in KERNELS if device.type == "cuda" else KERNELS[:-1]:
        used = FusedOp(work.plain, work.kernel, work.example, exact=work.exact)
        if device.type == "cuda":
            used(*used.example(device, dtype))
        else:
            with representing_cuda():  # Triton's interpreter runs the kernel
                used(*used.example(device, dtype))
        assert set(used.states().values()) == {"runs"}, work.kernel
