"""Allocator settings: freed memory is kept for the next allocation."""

import os
import subprocess
import sys

import pytest
import torch

from qlora.runtime.allocators import grow_by_pages

PROGRAM = """
import resource, sys, torch
from qlora.runtime.allocators import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
for _ in range(2):
    torch.ones(20_000_000).add_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(20_000_000).add_(1)  # 80 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("needs glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_memory_is_reused() -> None:
    assert faults("keep") < faults("default") / 5


@pytest.mark.parametrize("set_by_user", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_grows_by_pages_unless_the_user_sets_an_allocator(
    set_by_user: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if set_by_user:
        monkeypatch.setenv(set_by_user, "max_split_size_mb:512")
    said: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", said.append)
    grow_by_pages()
    assert said == ([] if set_by_user else ["expandable_segments:True"])


def test_torch_accepts_the_setting() -> None:
    """Torch without CUDA accepts it too."""
    program = "from qlora.runtime.allocators import grow_by_pages; grow_by_pages()"
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
