"""Imports everything that `qlora train` imports, once for all processes that tests fork; see `processes_for_tests`."""

import torch

import qlora.cli
import qlora.inference.chat
import qlora.training.train  # noqa: F401

torch.set_num_threads(1)
