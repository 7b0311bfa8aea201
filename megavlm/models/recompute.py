"""What recompute needs where not all of a model learns."""

import torch
from megatron.core.transformer.module import MegatronModule


def ready_for_recompute(hidden: torch.Tensor, module: MegatronModule) -> torch.Tensor:
    """The input of layers that are recomputed: it asks for a gradient whenever something in them learns.

    A recomputed piece has a gradient for its weights only if one of its inputs asks for one. Where the embedding is
    frozen, none does; adapters of the first layer would silently stay as they are.

    Args:
        hidden: hidden states.
        module: what holds the layers.
    """
    recomputes = module.config.recompute_granularity is not None
    if recomputes and torch.is_grad_enabled() and not hidden.requires_grad:
        hidden.requires_grad_(any(parameter.requires_grad for parameter in module.parameters()))
    return hidden
