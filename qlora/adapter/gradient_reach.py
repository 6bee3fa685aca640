"""Trained modules that no gradient reaches, because the model computes its loss without them.

A model can call a layer under `torch.no_grad`, as it does with the indexers of DeepSeek-V3.2, or not at all. An adapter
there looks like the others, and never learns.
"""

from torch import nn

from qlora.adapter.trained_rows import TrainedRows


def without_gradient(model: nn.Module) -> list[str]:
    """Return the modules whose trained parameters all have a gradient of zero, in the order of the model.

    Call it after a backward pass. Chosen rows of an embedding are left out: a batch need not have their tokens.
    """
    names = []
    for name, module in model.named_modules():
        trained = [tensor for tensor in module.parameters(recurse=False) if tensor.requires_grad]
        reached = any(tensor.grad is not None and bool(tensor.grad.any()) for tensor in trained)
        if trained and not reached and not isinstance(module, TrainedRows):
            names.append(name)
    return names
