"""The package on a GPU. Every test runs the same code on a CPU too, so that it cannot fail there for its own sake."""

from pathlib import Path

import gpu_for_tests as gpu
import pytest
import torch

HERE = pytest.param("cpu")
SLOWLY = pytest.param("cpu", marks=pytest.mark.slow)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
on_both = pytest.mark.parametrize("name", [HERE, GPU])
on_both_slowly = pytest.mark.parametrize("name", [SLOWLY, GPU])


@on_both
@pytest.mark.parametrize("shape", [(128, 320), (64, 64)])
def test_nf4_is_that_of_bitsandbytes_and_of_its_definition(name: str, shape: tuple[int, int]) -> None:
    gpu.check_nf4(torch.device(name), *shape)


@on_both
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("head_dim", "groups"), [(64, 1), (128, 2), (100, 2), (8, 1)])
def test_attention_over_documents_is_exact(name: str, head_dim: int, groups: int, window: int | None) -> None:
    gpu.check_attention(torch.device(name), (37, 1, 64, 20), head_dim, groups, window)


@on_both
def test_a_packed_row_keeps_its_documents_apart(name: str, tiny_llama: Path) -> None:
    gpu.check_packing(torch.device(name), tiny_llama)


@on_both_slowly
def test_a_killed_run_learns_the_same_after_its_resume(name: str, tmp_path: Path) -> None:
    gpu.check_killed_run(torch.device(name), tmp_path)


@on_both_slowly
def test_a_run_generates_its_likeliest_tokens(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    gpu.check_generation(torch.device(name), tiny_llama, tmp_path)


@on_both_slowly
def test_a_run_that_is_out_of_memory_continues(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    gpu.check_shortage(torch.device(name), tiny_llama, tmp_path)


@pytest.mark.slow
def test_a_forecast_on_a_cpu_is_the_measurement(tmp_path: Path) -> None:
    gpu.check_forecast("quickstart", torch.device("cpu"), tmp_path, 128, 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["llama-3.2-1b-instruct", "qwen3-4b-instruct"])
def test_a_forecast_is_what_the_driver_reports(model: str, tmp_path: Path) -> None:
    gpu.check_forecast(model, torch.device("cuda"), tmp_path, 512, 0.01)


@on_both
def test_paged_states_are_managed_memory(name: str) -> None:
    gpu.check_paging(torch.device(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.gpu
def test_every_kernel_runs_on_a_gpu(dtype: torch.dtype) -> None:
    gpu.check_kernels(torch.device("cuda"), dtype)


def test_every_kernel_runs_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="no Triton for this platform")
    gpu.check_kernels(torch.device("cpu"), torch.float32)
