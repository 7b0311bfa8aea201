"""What the pool runs for the planner's FLOPs: the forward passes of a real training step, counted by torch."""

from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.config.schema import Recipe
from megavlm.models.chunk import LanguageChunk
from megavlm.models.encoder import VisionEncoder
from megavlm.planner.flops import image_flops, language_flops
from megavlm.train import step as step_module
from megavlm.train.state import build_state


def _counted(call: Any, *arguments: Any) -> tuple[Any, int]:
    """What a call returns, and its FLOPs; attention by plain products, which the counter knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call(*arguments)
    return result, counter.get_total_flops()


def count_step(recipe: Recipe) -> dict[str, list[tuple[int, int]]]:
    """(counted, predicted) FLOPs of every forward pass of the encoder and of the language model in a step."""
    found: dict[str, list[tuple[int, int]]] = {"encoder": [], "language": []}
    state = build_state(recipe)
    architecture = state.directory.architecture
    encode, decode = VisionEncoder.forward, LanguageChunk.forward

    def encoded(module: VisionEncoder, patches: torch.Tensor, grid_NG: torch.Tensor) -> Any:
        result, counted = _counted(encode, module, patches, grid_NG)
        found["encoder"].append((counted, sum(image_flops(architecture, tuple(grid)) for grid in grid_NG.tolist())))
        return result

    def decoded(module: LanguageChunk, features: Any, tokens_T: torch.Tensor, *rest: torch.Tensor) -> Any:
        result, counted = _counted(decode, module, features, tokens_T, *rest)
        borders = rest[1]
        lengths = (borders[1:] - borders[:-1]).tolist()
        num_visual = int((tokens_T == architecture.inputs.image_token_id).sum())
        found["language"].append((counted, language_flops(architecture, lengths, num_visual)))
        return result

    VisionEncoder.forward, LanguageChunk.forward = encoded, decoded  # type: ignore[assignment,method-assign]
    try:
        step_module.train_step(state, 0)
    finally:
        VisionEncoder.forward, LanguageChunk.forward = encode, decode  # type: ignore[method-assign]
        state.loader.close()
    return found
