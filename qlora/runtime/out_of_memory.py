"""Recognises the many errors by which torch and its libraries say that memory is short."""

import errno

import torch

_SIGNS = (
    "out of memory",  # the driver, through torch.AcceleratorError
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",  # cuBLAS could not allocate its workspace
    "cudnn_status_alloc_failed",
    "defaultcpuallocator",
    "could not create a primitive",  # oneDNN
    "std::bad_alloc",
    "cannot allocate memory",
    "can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if `error` says that device or host memory is short.

    Examples:
        >>> is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
        True
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
