"""Transformer Engine's buffers for messages between tensor-parallel ranks that travel while products are computed."""

import torch
import torch.distributed as dist


def start_userbuffers(
    group: dist.ProcessGroup, num_tokens: int, hidden_size: int, dtype: torch.dtype, use_fp8: bool
) -> None:
    """Have Transformer Engine make its communicators, and buffers for rows of one length. Every rank calls this.

    It takes ranks of the world that follow each other for the tensor-parallel ones, from 0 on. Arguments are those
    that Megatron-LM gives it (megatron/training/initialize.py, _initialize_tp_communicators), and the type of what
    travels, which is bf16 otherwise.

    Args:
        group: this rank's tensor-parallel ranks.
        num_tokens: of a row, on a context-parallel rank.
        hidden_size: of the language model.
        dtype: of its activations.
        use_fp8: whether linears of the language model are in FP8.
    """
    from transformer_engine.pytorch.module import base

    ranks, size = dist.get_process_group_ranks(group), group.size()
    first = dist.get_rank() // size * size
    assert ranks == list(range(first, first + size)), f"tensor-parallel ranks {ranks} do not follow each other"
    base.initialize_ub(
        shape=[num_tokens, hidden_size],
        tp_size=size,
        use_fp8=use_fp8,
        dtype=dtype,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
