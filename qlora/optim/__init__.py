"""Optimizers over flat tensors. No other module uses bitsandbytes' optimizers directly.

The trainable parameters of one device and dtype are stored end to end in *one* tensor. Their gradients are in
another, and each optimizer state is in one too. One kernel then updates the 448 adapter matrices of an 8B model,
instead of 448 kernels with a synchronisation after each, and one kernel computes their norm. Paging also takes
effect: bitsandbytes pages only tensors of at least 100,000 elements, more than A or B of rank 16 have in the attention
of an 8B model.

Parameters in bf16 cannot represent small updates: near 1.0 the smallest step is 2^-8, and an update below half of
it is lost. The optimizer therefore updates an fp32 master copy and rounds it to bf16, as in mixed-precision
training (Micikevicius et al. 2018, section 3.1). The parameter itself is the upper half of that copy, so only the
16 bits lost in rounding are stored in addition. Parameters in fp32 are their own master copy.

Sources: AdamW, Loshchilov and Hutter 2019; Lion, Chen et al. 2023; 8-bit states in blocks of 256, Dettmers et
al. 2022; paged optimizers, QLoRA (Dettmers et al. 2023), section 3.
"""

from qlora.optim.methods import METHODS
from qlora.optim.optimizer import Optimizer
from qlora.optim.schedule import learning_rate

__all__ = ["METHODS", "Optimizer", "learning_rate"]
