"""In every Python of a null GPU: ways around answers that only a computation could give."""

import torch

torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN asks the device for more than a null GPU can say
_isfinite = torch.isfinite


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones((), dtype=torch.bool) if tensor.is_cuda else _isfinite(tensor)


torch.isfinite = torch.Tensor.isfinite = _finite  # what is read from the device is zero, which would mean: no
