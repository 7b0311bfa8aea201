"""Losses over pieces of logits against the same losses over whole ones."""

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavlm.losses.chunked import ProjectedLogits
from megavlm.losses.cross_entropy import cross_entropy, regularised_cross_entropy
from tests.pool import PoolKeeper

TOKENS, HIDDEN, VOCABULARY = 37, 16, 96


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator) * (torch.rand(TOKENS, generator=generator) > 0.3)
    return hidden.to(dtype), weight.to(dtype), labels, weights


def losses(chunk_tokens: int, dtype: str = "float32", regularised: bool = False) -> dict[str, Any]:
    """Run on a worker: loss, count, metrics and gradients; 0 for logits as a whole."""
    group = dist.group.WORLD
    assert group is not None
    hidden, weight, labels, weights = example({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    rank, size = group.rank(), group.size()
    hidden.requires_grad_()
    part = weight.chunk(size)[rank].clone().requires_grad_()
    logits = ProjectedLogits(hidden, part, chunk_tokens) if chunk_tokens else hidden @ part.t()
    if regularised:
        loss, count, metrics = regularised_cross_entropy(logits, labels, weights, group, VOCABULARY - 2, 0.1, 1e-2)
    else:
        loss, count, metrics = cross_entropy(logits, labels, weights, group)
    loss.backward()
    assert hidden.grad is not None and part.grad is not None
    return {"loss": loss.detach(), "count": count, "hidden": hidden.grad, "weight": part.grad, **metrics}


@pytest.mark.parametrize("regularised", [False, True], ids=["plain", "regularised"])
@pytest.mark.parametrize("chunk_tokens", [1, 10, 37, 1000])
@pytest.mark.parametrize("world_size", [1, 2])
def test_pieces_give_what_the_whole_gives(
    workers: PoolKeeper, world_size: int, chunk_tokens: int, regularised: bool
) -> None:
    run = "tests.unit.losses.test_chunked:losses"
    whole = workers(world_size).run(run, chunk_tokens=0, regularised=regularised)
    pieces = workers(world_size).run(run, chunk_tokens=chunk_tokens, regularised=regularised)
    for found, expected in zip(pieces, whole, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


def test_in_bf16_the_gradient_of_the_weight_adds_up_in_fp32(workers: PoolKeeper) -> None:
    """Seven pieces are as good as one: their sum is not rounded in between."""
    run = "tests.unit.losses.test_chunked:losses"
    (exact,), (whole,), (pieces,) = (
        workers(1).run(run, chunk_tokens=chunk, dtype=dtype)
        for chunk, dtype in ((0, "float32"), (0, "bfloat16"), (6, "bfloat16"))
    )
    for name in ("weight", "hidden"):
        errors = [float((one[name].float() - exact[name]).norm() / exact[name].norm()) for one in (whole, pieces)]
        assert errors[1] <= 1.2 * errors[0] < 0.02, (name, errors)
    assert pieces["weight"].dtype == torch.bfloat16


def test_no_more_logits_exist_at_a_time_than_those_of_a_piece() -> None:
    """Counted in forward and backward: bytes of all tensors with a column for each word that are alive."""
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, list | tuple) else (result,):
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == VOCABULARY:
                    alive.add(tensor.untyped_storage())
            most = max(most, sum(storage.nbytes() for storage in list(alive)))
            return result

    def peak(chunk_tokens: int) -> int:
        nonlocal most
        alive.clear()
        most = 0
        hidden, weight, labels, weights = example()
        hidden.requires_grad_()
        weight.requires_grad_()
        with Watch():
            logits = ProjectedLogits(hidden, weight, chunk_tokens) if chunk_tokens else hidden @ weight.t()
            loss, _, _ = cross_entropy(logits, labels, weights, _Alone())  # type: ignore[arg-type]
            loss.backward()
        return most

    row = VOCABULARY * 4
    whole, piece = peak(0), peak(4)
    assert whole >= 2 * TOKENS * row  # logits and softmax
    assert piece <= 6 * 4 * row + HIDDEN * row  # and the transposed weight, which has such columns too


class _Alone:
    """A process group of one, for code that asks for no more than that."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0
