import pytest
import torch

from tests.pool import PoolKeeper

CASES = "tests.unit.precision.linear_cases"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize("is_hybrid", [True, False], ids=["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_rounded_operands(workers: PoolKeeper, recipe: str, is_hybrid: bool) -> None:
    (found,) = workers(1).run(f"{CASES}:one_layer", recipe=recipe, is_hybrid=is_hybrid)
    for name in ("output", "dgrad", "wgrad"):
        expected = found[f"expected {name}"]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    distance = (found["output"] - found["unrounded"]).norm() / found["unrounded"].norm()
    assert 0.01 < float(distance) < 0.1  # FP8, and nothing but FP8


def test_a_product_is_that_of_torchs_scaled_mm(workers: PoolKeeper) -> None:
    ((ours, theirs),) = workers(1).run(f"{CASES}:scaled_mm")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_ranks_round_as_one_does(workers: PoolKeeper, recipe: str, sequence_parallel: bool) -> None:
    (alone,) = workers(1).run(f"{CASES}:two_layers", recipe=recipe, sequence_parallel=False)
    for found in workers(2).run(f"{CASES}:two_layers", recipe=recipe, sequence_parallel=sequence_parallel):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def test_scales_of_their_own_would_show(workers: PoolKeeper) -> None:
    (alone,) = workers(1).run(f"{CASES}:two_layers", recipe="tensorwise", sequence_parallel=False)
    found, _ = workers(2).run(f"{CASES}:two_layers", recipe="tensorwise", sequence_parallel=False, shares_amax=False)
    distance = (found["output"] - alone["output"]).norm() / alone["output"].norm()
    assert float(distance) > 1e-3


@pytest.mark.parametrize(
    ("length", "uses_max", "margin", "expected"),
    [
        # largest values 4, 8, 6 (of steps whose other value is 3), 0 left out: 448 / them
        (1, False, 0, [112.0, 56.0, 448 / 6, 448 / 3]),
        (1, True, 0, [112.0, 56.0, 448 / 6, 448 / 3]),
        (2, True, 0, [112.0, 56.0, 56.0, 448 / 6]),
        (3, True, 1, [56.0, 28.0, 28.0, 28.0]),
    ],
)
def test_delayed_scales_come_from_the_steps_before(
    workers: PoolKeeper, length: int, uses_max: bool, margin: int, expected: list[float]
) -> None:
    ((scales, seen),) = workers(1).run(
        f"{CASES}:delayed_scales", amaxes=[4.0, 8.0, 6.0, 0.5], length=length, uses_max=uses_max, margin=margin
    )
    assert scales == pytest.approx(expected, rel=1e-6)
    # the first step is scaled by itself; the second by the first, beyond whose range it is cut off
    assert float(seen[0][0, 1]) == pytest.approx(4.0, rel=1e-6)
    assert float(seen[1][0, 1]) == pytest.approx(4.0 * 2**margin, rel=1e-6)


def test_a_step_without_values_keeps_the_scale(workers: PoolKeeper) -> None:
    ((scales, _),) = workers(1).run(
        f"{CASES}:delayed_scales", amaxes=[4.0, float("inf"), 4.0], length=1, uses_max=False, margin=0
    )
    assert scales == [112.0, 112.0, 112.0]
