"""A stand-in for flash-attn.

Shape suffixes: T tokens, H heads, D head dim.
"""

import contextlib
import sys
import types
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from tests import contracts
from tests.stand_ins import calls


@calls.contracted("flash_attn_varlen_func", "max_seqlen_q", "max_seqlen_k", package="flash-attn")
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
) -> torch.Tensor:
    """Attention inside each segment, [T, H, D]; a causal mask ends at the last key."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0.0
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    outputs = []
    borders_q, borders_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for number in range(len(borders_q) - 1):
        of_q = slice(borders_q[number], borders_q[number + 1])
        of_k = slice(borders_k[number], borders_k[number + 1])
        query, key, value = (part.transpose(0, 1)[None] for part in (q[of_q], k[of_k], v[of_k]))
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0]) if causal else None
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=softmax_scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Have `import flash_attn` find the stand-in."""
    calls.use(contracts.load("flash-attn", contracts.FLASH_ATTENTION))
    module = types.ModuleType("flash_attn")
    vars(module)["flash_attn_varlen_func"] = flash_attn_varlen_func
    # not by `patch.dict`, which would take away whatever else is imported meanwhile
    sys.modules["flash_attn"] = module
    try:
        yield
    finally:
        del sys.modules["flash_attn"]
