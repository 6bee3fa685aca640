"""Search for a weight that is not finite, to name it when a model's loss is not."""

import torch
from torch import Tensor, nn

from qlora.quantization.expert_stack import ExpertStack
from qlora.quantization.nf4 import is_nf4, statistics


@torch.no_grad()
def not_finite(model: nn.Module) -> str | None:
    """Return the name of the first weight with a NaN or an infinity, in the order of the model; None if all are finite.

    Of a weight in NF4 only the statistics can have one.
    """
    for name, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            tensors = [parameter]
            if own == "weight" and is_nf4(module):
                tensors = statistics(module)
            elif own == "weight" and isinstance(module, ExpertStack) and module.packed:
                tensors = module.statistics()
            if any(_has_one(tensor) for tensor in tensors):
                # an adapted layer holds the frozen one as `base`
                return f"{name.removesuffix('.base')}.{own}"
    return None


def _has_one(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
