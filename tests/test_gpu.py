"""Behaviour on many kinds of GPU, each faked: old cards, WSL, old drivers, no compiler, memory held by others."""

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands_for_tests import qlora
from test_varlen_attention import definition
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DeepseekV3Config, Gemma4TextConfig, LlamaConfig, OPTConfig

from qlora.errors import ModelError, RecipeError, UsageError
from qlora.kernels import compiled_for, dispatch, norm
from qlora.memory import budget, measure, run_memory
from qlora.memory.advice import Advisor
from qlora.memory.architecture import architecture
from qlora.memory.estimate import estimate
from qlora.memory.forecast import forecast
from qlora.memory.live import LiveBytes, Trace
from qlora.memory.parts import PARTS
from qlora.memory.plan import needed
from qlora.memory.workload import assumed
from qlora.model.gpu_notes import gpu_notes, head_widths
from qlora.model.load import compute_dtype
from qlora.model.varlen_attention import arguments, attend, flash_obstacle
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.runtime import allocators, device, gpu
from qlora.runtime.device import automatic_dtype, device_name, device_named, device_of
from qlora.runtime.distributed import DataParallel
from qlora.runtime.fake import representing_cuda
from qlora.tracking.startup import Startup
from qlora.training import prepare

RecipeFile = Callable[..., Path]
GIB = 2**30
GPU, CPU = torch.device("cuda"), torch.device("cpu")


class Driver:
    """NVIDIA's driver library for ctypes: its answers to cuInit, its CUDA version and an attribute of its GPUs."""

    def __init__(self, code: int = 0, version: int = 13000, pages: int = 1) -> None:
        self.code, self.version, self.pages = code, version, pages
        self.asked: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self.code

    def cuDriverGetVersion(self, to: Any) -> int:
        ctypes.cast(to, ctypes.POINTER(ctypes.c_int))[0] = self.version
        return 0

    def cuDeviceGet(self, to: Any, ordinal: int) -> int:
        self.asked.append(ordinal)
        ctypes.cast(to, ctypes.POINTER(ctypes.c_int))[0] = 70 + ordinal
        return self.code

    def cuDeviceGetAttribute(self, to: Any, attribute: int, handle: ctypes.c_int) -> int:
        assert (attribute, handle.value) == (89, 70 + self.asked[-1])
        ctypes.cast(to, ctypes.POINTER(ctypes.c_int))[0] = self.pages
        return 0


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Let torch report two GPUs; yield the list of those that are made current."""
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    monkeypatch.setattr(gpu, "driver_library", Driver)
    matmul, before = (
        torch.backends.cuda.matmul,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )
    matmul.allow_bf16_reduced_precision_reduction = True
    yield current
    matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "reason"),
    [
        ((8, 0), torch.bfloat16, (128, 128), None),
        ((9, 0), torch.float16, (256, 256), None),
        ((12, 0), torch.bfloat16, (256, 256), None),
        ((9, 0), torch.bfloat16, (200, 200), None),
        ((7, 5), torch.float16, (128, 128), "8.0, and this GPU has 7.5"),
        ((8, 0), torch.float32, (128, 128), "not in float32"),
        ((8, 0), torch.bfloat16, (100, 100), "a head has 100 features"),
        ((8, 0), torch.bfloat16, (512, 512), "a head has 512 features"),
        ((8, 0), torch.bfloat16, (192, 128), "192 features a head and values 128"),
        ((8, 9), torch.bfloat16, (208, 208), "no backward pass"),
        ((12, 1), torch.bfloat16, (224, 224), "no backward pass"),
    ],
)
def test_flash_attention_has_limits(
    capability: tuple[int, int], dtype: torch.dtype, widths: tuple[int, int], reason: str | None
) -> None:
    found = flash_obstacle(capability, dtype, *widths)
    assert found is None if reason is None else reason in str(found)


@pytest.mark.parametrize(
    ("capability", "width", "value_width", "one_kernel"),
    [((8, 0), 8, 8, True), ((7, 5), 8, 8, False), ((8, 0), 12, 12, False), ((8, 0), 16, 8, False)],
)
def test_documents_attend_alone_where_flash_attention_cannot(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    width: int,
    value_width: int,
    one_kernel: bool,
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    with FakeTensorMode(), representing_cuda():
        query = torch.empty(1, 4, 10, width, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(1, 2, 10, width, dtype=torch.bfloat16)
        value = torch.empty(1, 2, 10, value_width, dtype=torch.bfloat16)
        more = arguments((7, 3), CPU)
        found, _ = attend(nn.Module(), query, key, value, more.pop("attention_mask"), scaling=0.3, **more)
        assert found.shape == (1, 10, 4, value_width)
        names = {type(node[0]).__name__.lower() for node in found.grad_fn.next_functions}
    assert any("varlen" in name for name in names) == one_kernel


@pytest.mark.parametrize("window", [None, 2])
def test_attention_without_flash_is_exact_and_keeps_documents_apart(window: int | None) -> None:
    query, (key, value) = torch.randn(1, 4, 9, 12), torch.randn(2, 1, 2, 9, 12)
    with representing_cuda():
        found, _ = attend(
            nn.Module(), query, key, value, None,
            scaling=0.3, sliding_window=window, document_lengths=(5, 4),
        )  # fmt: skip
    wide = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    torch.testing.assert_close(found, definition(query, *wide, [5, 4], window))


def test_no_kernel_of_an_old_gpu_gets_shared_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would compute all scores of a row in memory: only flash attention shares heads of keys and values."""
    asked: list[bool] = []
    real = nn.functional.scaled_dot_product_attention

    def heard(*tensors: Any, enable_gqa: bool, **more: Any) -> Any:
        asked.append(enable_gqa)
        return real(*tensors, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", heard)
    query, (key, value) = torch.randn(1, 4, 9, 8).bfloat16(), torch.randn(2, 1, 2, 9, 8).bfloat16()
    for capability, window in (((8, 0), None), ((8, 0), 2), ((7, 5), None)):
        monkeypatch.setattr(gpu, "capability", lambda device, found=capability: found)
        with representing_cuda():
            attend(nn.Module(), query, key, value, None, sliding_window=window, document_lengths=())
    assert asked == [True, False, False]


def test_a_forecast_counts_the_attention_of_the_gpu(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(
        recipe_file(base={"compute_dtype": "bfloat16"}, data={"packing": True}, training={"device": "auto"}),
        ["training.activation_checkpointing=none"],
    )
    sizes = []
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(gpu, "capability", lambda device, found=capability: found)
        made = forecast(recipe, assumed(recipe), architecture(recipe, cuda=True), cuda=True)
        sizes.append(made.trace.peak()[1]["saved_activations"])
    assert sizes[1] > sizes[0]  # keys and values of all heads


def test_an_old_gpu_computes_in_float32(
    two_gpus: list[Any], recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file(base={"compute_dtype": "auto"}))
    config = LlamaConfig()
    assert compute_dtype(recipe.base, GPU) == torch.float32
    assert automatic_dtype()[0] == "float32"
    notes = gpu_notes(recipe, config, GPU)
    assert notes[0].startswith("base.compute_dtype: auto is float32")
    assert "7.5" in notes[0]
    assert notes[1].startswith("attention runs document by document")
    emulated = gpu_notes(Recipe.load(recipe_file(base={"compute_dtype": "bfloat16"})), config, GPU)
    assert emulated[0].startswith("base.compute_dtype: bfloat16 is emulated")
    asked = gpu_notes(Recipe.load(recipe_file(base={"compute_dtype": "float32"})), config, GPU)
    assert not any("compute_dtype" in note for note in asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (8, 6))
    assert compute_dtype(recipe.base, GPU) == torch.bfloat16
    assert automatic_dtype()[0] == "bfloat16"
    assert gpu_notes(recipe, config, GPU) == gpu_notes(recipe, config, CPU) == []


def test_the_widths_of_heads_come_from_the_configuration() -> None:
    assert head_widths(LlamaConfig(hidden_size=3200, num_attention_heads=32)) == [(100, 100)]
    latent = DeepseekV3Config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    assert head_widths(latent) == [(192, 128)]
    assert head_widths(OPTConfig(hidden_size=768, num_attention_heads=12)) == [(64, 64)]  # has no head_dim
    assert head_widths(Gemma4TextConfig(head_dim=256, global_head_dim=512)) == [(256, 256), (512, 512)]


@pytest.mark.parametrize(
    ("release", "segments"),
    [("6.8.0-45-generic\n", True), ("5.15.167.4-microsoft-standard-WSL2\n", False), (None, True)],
)
def test_memory_does_not_grow_by_pages_under_wsl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, release: str | None, segments: bool
) -> None:
    file = tmp_path / "osrelease"
    if release is not None:
        file.write_text(release)
    monkeypatch.setattr(gpu, "KERNEL_RELEASE", file)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    allocators.grow_by_pages()
    assert bool(said) == segments


@pytest.fixture
def built_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch be a build for CUDA 13.0 that cannot use a GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device.environment, "driver_version", lambda: "535.104.05")


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize(("code", "words"), [(0, "up to 12.2,"), (803, "cuInit gives error 803")])
def test_a_driver_that_torch_cannot_use_is_an_error(
    monkeypatch: pytest.MonkeyPatch, recipe_file: RecipeFile, code: int, words: str
) -> None:
    monkeypatch.setattr(gpu, "driver_library", lambda: Driver(code, version=12020))
    for named in ("auto", "cuda", "cuda:1"):
        with pytest.raises(ModelError, match=words) as caught:
            device_named(named)
        assert all(
            part in str(caught.value) for part in ("535.104.05", torch.__version__, "13.0", "--device cpu")
        )
    recipe = Recipe.load(recipe_file(), ["training.device=auto"])
    with pytest.raises(ModelError, match=r"training\.device=cpu trains without the GPU"):
        DataParallel.of(recipe)
    assert device_named("cpu") == device_of(Recipe.load(recipe_file())) == CPU


@pytest.mark.usefixtures("built_for_cuda")
@pytest.mark.parametrize(
    "harmless",
    [
        {"library": None},
        {"library": Driver(gpu.NO_DEVICE)},
        {"library": Driver(gpu.STUB_LIBRARY)},
        {"library": Driver(), "hidden": ""},
        {"library": Driver(), "hidden": "-1"},
        {"library": Driver(), "cuda": None},
    ],
    ids=["no driver", "no GPU", "stub", "hidden", "hidden by -1", "torch without CUDA"],
)
def test_a_machine_without_a_gpu_for_torch_trains_on_its_cpu(
    monkeypatch: pytest.MonkeyPatch, harmless: dict[str, Any]
) -> None:
    monkeypatch.setattr(gpu, "driver_library", lambda: harmless["library"])
    if "cuda" in harmless:
        monkeypatch.setattr(torch.version, "cuda", None)
    if "hidden" in harmless:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", harmless["hidden"])
    assert device_named("auto") == CPU
    with pytest.raises(UsageError, match="torch finds no CUDA device"):
        device_named("cuda")


def test_paging_is_asked_of_the_gpu_in_use(two_gpus: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"pages": Driver(), "does not page": Driver(pages=0), "fails": Driver(code=1)}
    for name, driver in found.items():
        monkeypatch.setattr(gpu, "driver_library", lambda driver=driver: driver)
        assert gpu.can_page(torch.device("cuda:1")) == (name == "pages")
        assert gpu.can_page(GPU) == (name == "pages")
        assert driver.asked == [1, 0]
    monkeypatch.setattr(gpu, "driver_library", lambda: None)
    assert not gpu.can_page(GPU)


def test_state_that_cannot_be_paged_is_allocated_and_counted(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_memory_forecast.py` has the forecast of paged state."""
    monkeypatch.setattr(gpu, "can_page", lambda device: False)
    recipe = Recipe.load(recipe_file(adapter={"rank": 64}), ["training.device=auto"])
    made = forecast(recipe, assumed(recipe), architecture(recipe, cuda=True), cuda=True)
    parts = made.trace.peak()[1]
    assert parts["optimizer_state_paged"] == 0
    assert parts["optimizer_state"] > 10**6
    assert needed(made) == made.total_bytes
    notes = gpu_notes(recipe, LlamaConfig(), GPU)
    assert [note.partition(":")[0] for note in notes if "is not paged" in note] == ["optimizer.name"]
    plain = Recipe.load(recipe_file(optimizer={"name": "adamw"}), ["training.device=auto"])
    assert not any("is not paged" in note for note in gpu_notes(plain, LlamaConfig(), GPU))
    weights = {"w": nn.Parameter(torch.zeros(500, 256))}
    with representing_cuda():
        assert Optimizer(weights, name="paged_adamw_32bit").paged_bytes() == 0
        monkeypatch.setattr(gpu, "can_page", lambda device: True)
        assert Optimizer(weights, name="paged_adamw_32bit").paged_bytes() > 0
        assert not any("is not paged" in note for note in gpu_notes(recipe, LlamaConfig(), GPU))


def held(monkeypatch: pytest.MonkeyPatch, total: int, by_others: int) -> None:
    """Fake a GPU on which this process has a context, and others hold memory."""
    context = 500 * 10**6
    monkeypatch.setattr(measure, "capacity_bytes", lambda place: total if place.type == "cuda" else None)
    monkeypatch.setattr(measure, "free_bytes", lambda place: total - context - by_others)


def test_a_forecast_is_compared_with_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    row = np.zeros((1, len(PARTS)), dtype=np.int64)
    row[0, 0] = GIB
    made: Any = SimpleNamespace(trace=Trace(row, []), host_bytes=0)
    held(monkeypatch, 2 * GIB, 0)
    assert budget.held_by_others(GPU) == 0
    assert "WILL NOT FIT" not in run_memory._summary(made, GPU)
    held(monkeypatch, 2 * GIB, GIB + GIB // 2)
    line = run_memory._summary(made, GPU)
    assert "WILL NOT FIT" in line
    assert "this GPU has 2.00 GiB, and other programs use 1.4" in line


def test_estimate_leaves_out_what_others_hold(
    two_gpus: list[Any], recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    held(monkeypatch, 8 * GIB, 3 * GIB)
    monkeypatch.setattr(Advisor, "_most", lambda *_: 1)
    recipe = Recipe.load(recipe_file(), ["training.device=cuda:1"])
    found = estimate(recipe)
    assert found.capacity_bytes == pytest.approx(5 * GIB, rel=0.02)
    assert any(line.startswith("Other programs use 2.9") for line in found.lines())
    assert found.fits
    assert found.notes


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(dispatch, "headers", lambda: tmp_path)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    assert dispatch.cannot_compile() is None
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    assert "package gcc" in str(dispatch.cannot_compile())
    monkeypatch.setenv("CC", "tcc")
    assert dispatch.cannot_compile() is None
    (tmp_path / "Python.h").unlink()
    assert "package python3-dev" in str(dispatch.cannot_compile())
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert "pip install triton" in str(dispatch.cannot_compile())


def test_without_a_compiler_plain_torch_is_used_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "cannot_compile", lambda: "Triton needs a C compiler (package gcc)")
    counted = []
    for switch in ("on", "off"):  # the forecast with kernels comes first
        dispatch._compile.cache_clear()
        with monkeypatch.context() as patch:
            if switch == "on":
                patch.setattr(dispatch, "cannot_compile", lambda: None)
                assert compiled_for(GPU)
                assert not compiled_for(CPU)
            else:
                with pytest.warns(UserWarning, match=r"package gcc\)\. Plain torch is used"):
                    assert not compiled_for(GPU)
            with FakeTensorMode(), representing_cuda():
                x, weight = torch.empty(64, 256, dtype=torch.bfloat16), torch.empty(256)
                with LiveBytes() as live:
                    norm.normalize(x, weight, 1e-5)
            counted.append(live.trace().totals.max())
    dispatch._compile.cache_clear()
    assert counted[0] == 64 * 256 * 2
    assert counted[1] >= counted[0] + 64 * 256 * 4


def test_long_sums_are_not_added_in_bfloat16(two_gpus: list[Any]) -> None:
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    device_named("cpu")
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    device_named("auto")
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_one_of_several_gpus_can_be_chosen(two_gpus: list[Any], recipe_file: RecipeFile) -> None:
    assert device_named("cuda:1") == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    assert device_name(torch.device("cuda:1")) == "NVIDIA T4 (cuda:1 of 2 GPUs)"
    assert device_name(GPU) == "NVIDIA T4 (cuda:0 of 2 GPUs)"
    with pytest.raises(UsageError, match="--device cuda:2: torch finds only cuda:0, cuda:1"):
        device_named("cuda:2")
    with pytest.raises(UsageError, match="devices are called auto"):
        device_named("gpu")
    with pytest.raises(
        RecipeError, match=r"training\.device: is cuda:7, but torch finds only cuda:0, cuda:1"
    ):
        device_of(Recipe.load(recipe_file(), ["training.device=cuda:7"]))
    with pytest.raises(RecipeError, match=r"must be auto, cpu, cuda or the number of a GPU, such as cuda:1"):
        Recipe.load(recipe_file(), ["training.device=gpu1"])


def test_a_run_takes_the_chosen_gpu(
    two_gpus: list[Any], recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.runtime.distributed.grow_by_pages", lambda: None)
    first = SimpleNamespace(device=torch.device("cuda:0"), process_index=0, num_processes=1)
    monkeypatch.setattr("qlora.runtime.distributed.Accelerator", lambda cpu: first)
    recipe = Recipe.load(recipe_file(), ["training.device=cuda:1"])
    assert DataParallel.of(recipe).device == torch.device("cuda:1")
    assert two_gpus[-1] == torch.device("cuda:1")
    assert DataParallel.of(Recipe.load(recipe_file(), ["training.device=cuda"])).device == first.device
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="cuda:1 is one GPU, but this run has 2 processes"):
        DataParallel.of(recipe)


@pytest.mark.usefixtures("without_forecast")
def test_a_run_says_once_that_kernels_are_compiled(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(recipe_file())
    for compiles in (True, False):
        monkeypatch.setattr(prepare, "compiled_for", lambda device, answer=compiles: answer)
        startup = Startup(shown=False)
        prepare.prepare(recipe, DataParallel(CPU), startup=startup)
        assert sum("compiling kernels" in stage for stage in startup.seconds) == compiles


@pytest.mark.parametrize(
    "command",
    [("generate", "--prompt", "x"), ("eval",), ("chat",), ("merge", "--to", "merged")],
    ids=lambda c: c[0],
)
def test_each_command_names_its_device_first(command: tuple[str, ...], tmp_path: Path) -> None:
    name, *options = command
    done = qlora(name, str(tmp_path / "nowhere"), *options)
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert lines[1] == f"device  {device_name(CPU)}", lines
    assert qlora(name, str(tmp_path / "nowhere"), *options, "--device", "cuda:x").returncode == 2
