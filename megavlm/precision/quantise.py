"""Rounding to FP8 numbers and back, with the scales of Transformer Engine's recipes.

`by_...` take fp32 or bf16 values and return what FP8 leaves of them in fp32. Whether it is in the size of the values
again (blocks) or in that of the FP8 numbers (one scale for a whole tensor), each says.
Shape suffixes: R rows, C columns of a matrix.
Sources: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433); NVIDIA/TransformerEngine v2.11
(pytorch/quantization.py `_default_sf_compute`, common/recipe, the quantisers of pytorch/tensor); Rouhani et al.,
Microscaling Data Formats (arXiv 2310.10537), with the exponent rounded up as in Mishra et al., Recipes for
Pre-training LLMs with MXFP8 (arXiv 2506.08027); DeepSeek-V3 (arXiv 2412.19437), section 3.3.
"""

import functools

import torch

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

BLOCK = 128
"""Numbers of a row (and rows, of weights) that share a scale in the recipe `blockwise`."""
MX_BLOCK = 32
"""Numbers that share a scale in the recipe `mxfp8`."""

_LARGEST_FP32 = torch.finfo(torch.float32).max
_E8M0_BIAS = 127  # exponents of an E8M0 scale are -127 to 127


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest FP8 numbers (ties to even), too large values becoming the largest one; NaN stays NaN.

    torch alone makes NaN (E4M3) or infinity (E5M2) of too large values; the hardware's conversion saturates.
    """
    most = torch.finfo(dtype).max
    return values.float().clamp(-most, most).to(dtype)


@functools.lru_cache
def _numbers(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The 256 numbers of a format by their bits, in fp32."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()


def decode(numbers: torch.Tensor) -> torch.Tensor:
    """FP8 numbers in fp32; by a table, as torch's own conversion takes six times as long on a CPU."""
    bits = numbers.view(torch.uint8).flatten().int()
    return _numbers(numbers.dtype, numbers.device).index_select(0, bits).view(numbers.shape)


def _cast_in_place(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `cast`, of fp32 values that nobody needs any more."""
    most = torch.finfo(dtype).max
    return values.clamp_(-most, most).to(dtype)


def largest(values: torch.Tensor) -> torch.Tensor:
    """Largest absolute value, an fp32 scalar; 0 of nothing."""
    return values.detach().abs().amax().float() if values.numel() else torch.zeros((), device=values.device)


def scale_of(
    amax: torch.Tensor, dtype: torch.dtype, margin: int = 0, before: torch.Tensor | None = None
) -> torch.Tensor:
    """What values are multiplied by, so that `amax` becomes the largest FP8 number, or 2 ** margin less.

    Args:
        amax: fp32, any shape.
        dtype: of the FP8 numbers.
        margin: powers of two that are left free.
        before: the scale where `amax` says nothing (0, infinite or NaN); None: 1.
    """
    before = torch.ones_like(amax) if before is None else before
    scale = torch.finfo(dtype).max / amax / 2**margin
    scale = torch.where((amax > 0) & torch.isfinite(amax), scale, before)
    return torch.where(torch.isinf(scale), torch.full_like(scale, _LARGEST_FP32), scale)


def by_tensor(values: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """One scale for all values (recipes `delayed` and `tensorwise`): FP8 numbers, `scale` times too large."""
    return decode(_cast_in_place(values.float() * scale, dtype))


def _in_blocks(values_RC: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """fp32 [blocks, rows of a block, blocks, columns of a block], filled up with zeros."""
    num_rows, num_columns = values_RC.shape
    rows, columns = (min(size, length) for size, length in zip(block, values_RC.shape, strict=True))
    padding = (0, -num_columns % columns, 0, -num_rows % rows)
    padded = torch.nn.functional.pad(values_RC.detach().float(), padding) if any(padding) else values_RC.float()
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def block_amax(values_RC: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest absolute value of each block; those at the end of a row or column may be smaller."""
    return _in_blocks(values_RC, block).abs().amax(dim=(1, 3))


def spread_blocks(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Each block's scale at every place of the block."""
    rows, columns = (min(size, length) for size, length in zip(block, shape, strict=True))
    wide = scales.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
    return wide[: shape[0], : shape[1]]


def power_of_two_below(scale: torch.Tensor) -> torch.Tensor:
    """The largest power of two that is not above a scale: its bits without those of the mantissa."""
    return (scale.view(torch.int32) & -(1 << 23)).view(torch.float32)


def by_block(values_RC: torch.Tensor, dtype: torch.dtype, block: tuple[int, int]) -> torch.Tensor:
    """A power of two for each block (recipe `blockwise`: 1 x 128, and 128 x 128 of weights), divided out again."""
    if not values_RC.numel():
        return values_RC.float()
    blocks = _in_blocks(values_RC, block)
    scales = power_of_two_below(scale_of(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype))
    rounded = decode(_cast_in_place(blocks * scales, dtype)).div_(scales)
    return _out_of_blocks(rounded, values_RC.shape)


def _out_of_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocks.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def e8m0_exponents(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Exponent of what FP8 numbers are multiplied by, so that `amax` is in range: ceil(log2(amax / largest)).

    The OCP specification rounds it down, and lets the largest values saturate.
    """
    ratio = amax / torch.finfo(dtype).max
    fraction, exponent = torch.frexp(ratio)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # a power of two is its own ceiling
    return torch.where(ratio > 0, exponent, -_E8M0_BIAS).clamp(-_E8M0_BIAS, _E8M0_BIAS)


def by_mx_block(values_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A power of two (E8M0) for each 32 numbers of a row (recipe `mxfp8`), divided out again."""
    if not values_RC.numel():
        return values_RC.float()
    blocks = _in_blocks(values_RC, (1, MX_BLOCK))
    exponents = e8m0_exponents(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype)
    one = torch.ones((), device=values_RC.device)
    scaled = blocks * torch.ldexp(one, -exponents)
    rounded = decode(_cast_in_place(scaled, dtype)).mul_(torch.ldexp(one, exponents))
    return _out_of_blocks(rounded, values_RC.shape)
