"""Facts about a GPU and its driver that decide what runs there. Each is one function, so that a test can replace it.

A forecast can be for a GPU that is not here; it then assumes a GPU that has everything.
"""

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

ASSUMED_CAPABILITY = (8, 0)
"""compute capability of a GPU that is not here"""

WITH_BFLOAT16 = (8, 0)
"""first compute capability with bfloat16 arithmetic, and with flash attention; older GPUs have neither"""

NO_DEVICE, STUB_LIBRARY = 100, 34
"""results of cuInit on a machine whose driver has no GPU, and of the library that only serves to link programs"""

CONCURRENT_MANAGED_ACCESS = 89
"""number of the attribute in CUdevice_attribute (cuda.h)"""

KERNEL_RELEASE = Path("/proc/sys/kernel/osrelease")


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, such as (8, 6)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else ASSUMED_CAPABILITY


def has_bfloat16(device: torch.device) -> bool:
    """Return True if the GPU computes bfloat16 in hardware; older ones emulate it."""
    return capability(device) >= WITH_BFLOAT16


def under_wsl() -> bool:
    """Return True within Windows Subsystem for Linux, whose CUDA differs in how it allocates and pages."""
    try:
        return "microsoft" in KERNEL_RELEASE.read_text().lower()
    except OSError:
        return False


def can_page(device: torch.device) -> bool:
    """Return True if the driver can move managed memory of the GPU to the host and back while both use it.

    Windows (also WSL) and many virtual GPUs cannot: there, managed memory takes as much of the GPU as any other.
    """
    if not torch.cuda.is_available():
        return True
    library, handle, value = driver_library(), ctypes.c_int(), ctypes.c_int()
    if library is None:
        return False
    ordinal = torch.cuda.current_device() if device.index is None else device.index
    failed = library.cuDeviceGet(ctypes.byref(handle), ordinal)
    failed = failed or library.cuDeviceGetAttribute(ctypes.byref(value), CONCURRENT_MANAGED_ACCESS, handle)
    return not failed and value.value == 1


def unusable_driver() -> str | None:
    """Say why torch cannot use this machine's NVIDIA driver; None if it can, or if there is no GPU for it to use."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or (library := driver_library()) is None:
        return None
    code, version = library.cuInit(0), ctypes.c_int()
    if code in (NO_DEVICE, STUB_LIBRARY):
        return None
    library.cuDriverGetVersion(ctypes.byref(version))
    supported = f"{version.value // 1000}.{version.value % 1000 // 10}"
    started = f"; it does not start (cuInit gives error {code})" if code else ""
    return (
        f"torch cannot use the NVIDIA driver, which supports CUDA up to {supported}, while torch {torch.__version__} "
        f"needs CUDA {torch.version.cuda}{started}"
    )


def driver_library() -> Any | None:
    """Return NVIDIA's driver as a ctypes library; None if it is not installed."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def sum_in_fp32() -> None:
    """Make cuBLAS add the parts of a long bfloat16 sum in fp32, for the rest of the process.

    By default, torch lets cuBLAS split a long sum among several blocks and add their results in bfloat16, which rounds
    each of them to 8 bits. This concerns the gradients of A and B, which are sums over all tokens of a micro-batch, and
    it would make them depend on how a GPU splits a sum. The tensor cores add in fp32 in any case, so only the parts
    cost more memory traffic. The loss of speed has not been measured.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
