"""What becomes of a tensor when it is written to a Hugging Face directory: one type for all, or FP8 with block scales.

The FP8 format is that of DeepSeek-V3's and Qwen3's FP8 releases, which transformers (`FineGrainedFP8Config`) and vLLM
read: E4M3 weights of linear layers, and beside each `<name>_scale_inv` in fp32, what a 1 among the FP8 numbers of each
128 x 128 block stands for.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megavlm.checkpoint.safetensors_writer import TensorSpec
from megavlm.models.weight_map import Entry
from megavlm.precision import quantise
from megavlm.precision.quantise import BLOCK, E4M3

_DECODER_LINEAR = re.compile(
    r"language\.decoder\.layers\.\d+\.(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])\.weight"
)


class WeightFormat(Protocol):
    """How tensors are written, by their Hugging Face names."""

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """What is written of a tensor."""

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same, with its numbers."""

    def keeps(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the bytes of a tensor of this type are written as they are."""


@dataclass(frozen=True)
class OneType:
    """Every tensor in one floating type."""

    dtype: torch.dtype

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """As `WeightFormat` says."""
        return {name: TensorSpec(shape, self.dtype)}

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `WeightFormat` says."""
        return {name: tensor.to(self.dtype)}

    def keeps(self, _name: str, dtype: torch.dtype) -> bool:
        """As `WeightFormat` says."""
        return dtype == self.dtype


@dataclass(frozen=True)
class BlockFp8:
    """Some matrices in E4M3 with a scale for each 128 x 128 numbers, all else in another type.

    Attributes:
        names: of the matrices; their sides are multiples of 128.
        rest: the other type.
    """

    names: frozenset[str]
    rest: torch.dtype

    def specs(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """As `WeightFormat` says."""
        if name not in self.names:
            return {name: TensorSpec(shape, self.rest)}
        rows, columns = shape
        return {
            name: TensorSpec(shape, E4M3),
            f"{name}_scale_inv": TensorSpec((rows // BLOCK, columns // BLOCK), torch.float32),
        }

    def tensors(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `WeightFormat` says; scales are powers of two, so that these are the numbers that `blockwise` trains."""
        if name not in self.names:
            return {name: tensor.to(self.rest)}
        block = (BLOCK, BLOCK)
        scales = quantise.power_of_two_below(quantise.scale_of(quantise.block_amax(tensor, block), E4M3))
        wide = quantise.spread_blocks(scales, block, tensor.shape)
        return {name: quantise.cast(tensor.float() * wide, E4M3), f"{name}_scale_inv": 1 / scales}

    def keeps(self, name: str, dtype: torch.dtype) -> bool:
        """As `WeightFormat` says."""
        return name not in self.names and dtype == self.rest


def fp8_names(entries: Iterable[Entry], shapes: dict[str, tuple[int, ...]]) -> frozenset[str]:
    """Hugging Face names of what goes into FP8: the matrices of decoder layers whose sides are multiples of 128.

    Args:
        entries: weight map of the model.
        shapes: of all tensors by their Hugging Face names.
    """
    names = [name for entry in entries if _DECODER_LINEAR.fullmatch(entry.native) for name in entry.names]
    return frozenset(
        name for name in names if len(shapes[name]) == 2 and not any(side % BLOCK for side in shapes[name])
    )


def quantization_config(names: frozenset[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The section of config.json that tells transformers and vLLM; it lists every matrix that is not in FP8."""
    others = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(name.removesuffix(".weight") for name in others if name not in names),
    }
