"""FP8 numbers and scales, by hand and against torch's own conversion."""

import math

import pytest
import torch

from megavlm.precision import quantise
from megavlm.precision.quantise import E4M3, E5M2

DTYPES = [E4M3, E5M2]


def spread(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape, generator=generator))


def grid(dtype: torch.dtype) -> torch.Tensor:
    """Every finite FP8 number."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return every[torch.isfinite(every)]


def nearest(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest FP8 number, by looking at all of them; ties go to that with an even mantissa."""
    numbers = grid(dtype).unique().double()
    distance = (values.double()[..., None] - numbers).abs()
    closest = distance == distance.min(dim=-1, keepdim=True).values
    is_even = (numbers.float().to(dtype).view(torch.uint8) & 1) == 0
    return numbers[(closest.int() * 2 + (closest & is_even).int()).argmax(dim=-1)].float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast_takes_the_nearest_number_and_saturates(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    numbers = grid(dtype).unique()
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    values = torch.cat((spread(2000), numbers, midpoints, torch.tensor([most * 4, -most * 1e9, math.inf, -math.inf])))
    rounded = quantise.cast(values, dtype)
    assert rounded.dtype == dtype
    assert torch.equal(rounded.float(), nearest(values.clamp(-most, most), dtype))
    inside = values.abs() <= most
    assert torch.equal(rounded[inside].float(), values[inside].to(dtype).float())
    assert torch.isnan(quantise.cast(torch.tensor([math.nan]), dtype).float()).all()


def test_the_formats_are_those_of_the_paper() -> None:
    # arXiv 2209.05433, table 1
    assert (torch.finfo(E4M3).max, torch.finfo(E5M2).max) == (448.0, 57344.0)
    assert quantise.cast(torch.tensor([2.0**-9, 2.0**-11]), E4M3).float().tolist() == [2.0**-9, 0.0]
    assert quantise.cast(torch.tensor([2.0**-16, 2.0**-18]), E5M2).float().tolist() == [2.0**-16, 0.0]
    assert quantise.cast(torch.tensor([17.0, 18.0, 19.0, 20.5]), E4M3).float().tolist() == [16.0, 18.0, 20.0, 20.0]


def test_a_scale_brings_the_largest_value_to_the_largest_number() -> None:
    amax = torch.tensor([1.0, 448.0, 0.0, math.inf, math.nan, 1e-45])
    expected = [448.0, 1.0, 1.0, 1.0, 1.0, torch.finfo(torch.float32).max]
    assert quantise.scale_of(amax, E4M3).tolist() == expected
    before = torch.full_like(amax, 3.0)
    assert quantise.scale_of(amax, E4M3, before=before).tolist() == [448.0, 1.0, 3.0, 3.0, 3.0, expected[-1]]
    assert quantise.scale_of(torch.tensor(2.0), E5M2, margin=3).item() == 57344 / 2 / 8


def test_one_scale_for_a_tensor_by_hand() -> None:
    values = torch.tensor([[1.0, -0.5, 0.3, 0.001]])
    scale = quantise.scale_of(quantise.largest(values), E4M3)
    # times 448: 448, -224, 134.4 between 128 and 144, 0.448 between 0.4375 and 0.46875
    assert quantise.by_tensor(values, E4M3, scale).tolist() == [[448.0, -224.0, 128.0, 0.4375]]
    assert quantise.largest(values[:0]).item() == 0.0


def test_a_power_of_two_is_never_above() -> None:
    scales = torch.tensor([1.0, 1.5, 1.9999999, 2.0, 448.0, 3e-39, 1e30])
    found = quantise.power_of_two_below(scales)
    assert found[:5].tolist() == [1.0, 1.0, 1.0, 2.0, 256.0]
    assert found[6].item() == 2.0 ** math.floor(math.log2(1e30))
    assert (found <= scales).all()


def test_blocks_along_rows_and_squares() -> None:
    values = spread(130, 260)
    for block in ((1, 128), (128, 1), (128, 128)):
        rounded = quantise.by_block(values, E4M3, block)
        for top in range(0, 130, block[0]):
            for left in range(0, 260, block[1]):
                part = values[top : top + block[0], left : left + block[1]]
                scale = 2.0 ** math.floor(math.log2(float(448 / part.abs().max())))
                expected = quantise.cast(part * scale, E4M3).float() / scale
                assert torch.equal(rounded[top : top + block[0], left : left + block[1]], expected)
    assert torch.equal(quantise.by_block(torch.zeros(3, 5), E4M3, (1, 128)), torch.zeros(3, 5))
    assert quantise.by_block(values[:0], E4M3, (1, 128)).shape == (0, 260)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponents_of_mxfp8_are_rounded_up(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    amax = torch.tensor([most, most * 1.0001, most / 2, most / 2.0001, 1.0, 0.0, 1e-45])
    exponents = quantise.e8m0_exponents(amax, dtype)
    assert exponents[:4].tolist() == [0, 1, -1, -1]
    assert exponents[4].item() == math.ceil(math.log2(1 / most))
    assert exponents[5:].tolist() == [-127, -127]


def test_mxfp8_by_block_of_32() -> None:
    values = spread(3, 80, seed=1)
    values[1, :32] = 0
    rounded = quantise.by_mx_block(values, E4M3)
    for row in range(3):
        for left in range(0, 80, 32):
            part = values[row, left : left + 32]
            amax = float(part.abs().max())
            unit = 2.0 ** (math.ceil(math.log2(amax / 448)) if amax else -127)
            assert torch.equal(rounded[row, left : left + 32], quantise.cast(part / unit, E4M3).float() * unit)
            assert float(rounded[row, left : left + 32].abs().max()) <= amax * (1 + 2**-4)  # nothing is cut off


def test_errors_are_those_of_three_and_two_digits() -> None:
    """The largest relative error of a normal number is at the middle between 1 and the next: 1/17 and 1/9."""
    values = spread(64, 256, seed=2)
    exact = {E4M3: 1 / 17, E5M2: 1 / 9}
    for dtype, bound in exact.items():
        rounded = quantise.by_block(values, dtype, (1, 128))
        smallest_normal = torch.finfo(dtype).smallest_normal
        units = 1 / quantise.power_of_two_below(quantise.scale_of(quantise.block_amax(values, (1, 128)), dtype))
        normal = values.abs() >= quantise.spread_blocks(units, (1, 128), values.shape) * smallest_normal
        error = ((rounded - values).abs() / values.abs())[normal]
        assert 0.99 * bound < float(error.max()) <= bound * (1 + 1e-6)
