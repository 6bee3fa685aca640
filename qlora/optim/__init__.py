"""Optimizers over flat tensors: the only door to bitsandbytes' optimizers.

The trainable parameters of one device and dtype lie end to end in *one* tensor, their gradients in another,
and so do the optimizer's states. The 448 adapter matrices of an 8B model are then updated by one kernel
instead of 448 with a synchronisation after each, their norm is one kernel, and paging is real: bitsandbytes
pages tensors of 100,000 elements and more only, which no single attention matrix of rank 16 reaches.

Parameters in bf16 cannot hold small updates: next to 1.0 the smallest step is 2^-8, and an update below half
of it vanishes. So the optimizer steps a master copy in fp32 and rounds it into the bf16 parameters, as in
mixed-precision training (Micikevicius et al. 2018, section 3.1). Of that copy the parameter itself is the upper
half, so only the 16 bits that rounding left over are kept. Parameters in fp32 are their own master.

Sources: AdamW, Loshchilov and Hutter 2019; Lion, Chen et al. 2023; 8-bit states in blocks of 256, Dettmers et
al. 2022; paged optimizers, QLoRA (Dettmers et al. 2023), section 3.
"""

from qlora.optim.methods import METHODS
from qlora.optim.optimizer import Optimizer
from qlora.optim.schedule import learning_rate

__all__ = ["METHODS", "Optimizer", "learning_rate"]
