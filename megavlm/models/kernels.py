"""What fused attention kernels take. Where they refuse, a module's attention is computed by torch, and the log says so.

Source: FlashAttention-2 (Dao-AILab/flash-attention 2.8) and Transformer Engine 2.11 and 2.20
(`get_attention_backend`): both take half precision, and heads of a multiple of 8 channels up to 256.

The windows of a vision tower's attention are segments of a packed row, which the kernels take like samples.
"""

import functools
import logging

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

logger = logging.getLogger(__name__)

HALF_PRECISIONS: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
HEAD_DIM_MULTIPLE = 8
MAX_HEAD_DIM = 256
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


def refusal(config: TransformerConfig) -> str:
    """Why fused kernels do not take the attention of a tower or language model; empty if they do."""
    if config.params_dtype not in HALF_PRECISIONS:
        return f"{str(config.params_dtype).removeprefix('torch.')} is no half precision"
    if config.kv_channels % HEAD_DIM_MULTIPLE or config.kv_channels > MAX_HEAD_DIM:
        return f"head_dim {config.kv_channels} is no multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
    return ""


def takes(config: TransformerConfig, backend: str, attn_mask_type: AttnMaskType) -> bool:
    """Whether fused kernels take it; logs once if they do not.

    Args:
        config: of the tower or language model.
        backend: what the log calls the kernels.
        attn_mask_type: tells the two apart.
    """
    reason = refusal(config)
    if reason:
        _say_once("language model" if attn_mask_type in CAUSAL else "vision tower", backend, reason)
    return not reason


@functools.cache
def _say_once(part: str, backend: str, reason: str) -> None:
    logger.info("model.backend=%s: attention of the %s is computed by torch (%s)", backend, part, reason)
