"""Adapts torch, in every Python process on a null GPU, where it needs results that only a computation gives."""

import torch

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN queries more of the device than a null GPU answers
_isfinite = torch.isfinite


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool) if tensor.is_cuda else _isfinite(tensor)


torch.isfinite = torch.Tensor.isfinite = _finite  # type: ignore[assignment, method-assign]  # reads from the device give zero, which would mean "not finite"
