"""Rotary angles from explicit positions, for language models (one or three axes) and vision towers (two axes).

Angles are computed for the WHOLE packed row: Megatron-Core picks a context-parallel rank's part itself.
RoPE: Su et al., arXiv 2104.09864. Multimodal RoPE: Qwen2-VL, arXiv 2409.12191, section 2.1; interleaved: Qwen3-VL.

Shape suffixes: 3 the (temporal, height, width) axes, B batch (1), T tokens, P patches, F frequencies, D head dim = 2F.
"""

import math
from typing import Any

import torch
from torch import nn

from megavlm.models.architecture import RopeScaling


class RotaryAngles(nn.Module):
    """Angles of the language model; stands in for Megatron-Core's MultimodalRotaryEmbedding.

    One-axis models give three equal rows of positions and `section=None`.
    """

    def __init__(
        self,
        head_dim: int,
        base: float,
        section: tuple[int, int, int] | None,
        interleaved: bool,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        # a plain attribute: it must stay fp32 in a bf16 model, and is no part of the state
        self.inverse_frequencies_F = inverse_frequencies(head_dim, base, device, scaling)
        self.section = section
        self.interleaved = interleaved

    def forward(self, position_ids_3BT: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """Angles [T, 1, 1, D] in fp32 for positions [3, 1, T]."""
        angles_3TF = position_ids_3BT[:, 0, :, None].float() * self.inverse_frequencies_F
        angles_TF = self._mix_axes(angles_3TF)
        return torch.cat((angles_TF, angles_TF), dim=-1)[:, None, None, :]

    def _mix_axes(self, angles_3TF: torch.Tensor) -> torch.Tensor:
        if self.section is None:
            return angles_3TF[0]
        if not self.interleaved:
            parts = angles_3TF.split(list(self.section), dim=-1)
            return torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        mixed_TF = angles_3TF[0].clone()
        for axis in (1, 2):
            picked = slice(axis, 3 * self.section[axis], 3)
            mixed_TF[:, picked] = angles_3TF[axis][:, picked]
        return mixed_TF


def inverse_frequencies(
    head_dim: int, base: float, device: torch.device, scaling: RopeScaling | None = None
) -> torch.Tensor:
    """Inverse frequencies [F] in fp32, stretched.

    Source: position interpolation, Chen et al., arXiv 2306.15595 (`linear`); Llama 3.1's model code (`llama3`); YaRN,
    Peng et al., arXiv 2309.00071, section 3.2 (`yarn`), with the ramp over the number of the frequency, as in the
    authors' code (jquesnelle/yarn) and in transformers.
    """
    frequencies_F = base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    inverse_F = 1.0 / frequencies_F
    if scaling is None:
        return inverse_F
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    if scaling.kind == "yarn":
        first, last = (_number_of_turns(turns, head_dim, base, scaling.original_max_positions) for turns in (high, low))
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        last += 0.001 if first == last else 0  # a step
        numbers_F = torch.arange(len(inverse_F), dtype=torch.float32, device=device)
        weight_F = 1 - ((numbers_F - first) / (last - first)).clamp(0, 1)
        return (1.0 / (scaling.factor * frequencies_F)) * (1 - weight_F) + inverse_F * weight_F
    stretched_F = inverse_F / scaling.factor
    if scaling.kind == "linear":
        return stretched_F
    # turns within the context of pretraining: 0 where slow, 1 where fast
    turns_F = scaling.original_max_positions * inverse_F / (2 * math.pi)
    weight_F = ((turns_F - low) / (high - low)).clamp(0, 1)
    return (1 - weight_F) * stretched_F + weight_F * inverse_F


def _number_of_turns(turns: float, head_dim: int, base: float, num_positions: int) -> float:
    """The (broken) number of the frequency that turns so often within some positions."""
    return head_dim * math.log(num_positions / (turns * 2 * math.pi)) / (2 * math.log(base))


def axial_angles(rows_P: torch.Tensor, columns_P: torch.Tensor, head_dim: int, base: float = 10000.0) -> torch.Tensor:
    """Vision RoPE: the first half of the frequencies turns with the row, the second with the column.

    Returns:
        [P, 1, 1, D] in fp32.
    """
    half = head_dim // 2
    inverse = 1.0 / base ** (torch.arange(0, half, 2, dtype=torch.float32, device=rows_P.device) / half)
    angles = torch.cat((rows_P[:, None].float() * inverse, columns_P[:, None].float() * inverse), dim=-1)
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]
