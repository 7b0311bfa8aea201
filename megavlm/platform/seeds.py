"""Seeding of every random source a run uses."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, and Megatron-Core's model-parallel tracker (call after the groups exist).

    Dropout inside tensor-parallel regions must differ between TP ranks and agree elsewhere: the tracker sees to it.
    """
    from megatron.core import tensor_parallel

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
