"""The CPU's kernels against the same written operation by operation, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megavlm.platform import cpu_kernels
from tests.pool import PoolKeeper

TOKENS, HEADS, HEAD_DIM = 7, 3, 8
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_gradients(function, *inputs):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(random(*out.shape, dtype=out.dtype, seed=9))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_equal(actual, expected, dtype=torch.float32):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING[dtype] * scale)


def saved(function, *inputs):
    """Shapes of what autograd keeps beside leaves."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sorted(shapes)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_rms_norm_is_torchs(dtype):
    x, weight = random(TOKENS, 1, 32, dtype=dtype), random(32, dtype=dtype, seed=1)
    expected = with_gradients(lambda x, weight: F.rms_norm(x, (32,), weight, 1e-3), x, weight)
    actual = with_gradients(lambda x, weight: cpu_kernels.rms_norm(x, weight, 1e-3), x, weight)
    assert torch.equal(actual[0], expected[0])
    assert_equal(actual, expected, dtype)


def test_rms_norm_takes_heads_out_of_a_wider_tensor():
    mixed, weight = random(TOKENS, 1, HEADS, 2 * HEAD_DIM), random(HEAD_DIM, seed=1)
    expected = with_gradients(lambda x, w: F.rms_norm(x[..., HEAD_DIM:], (HEAD_DIM,), w, 1e-6), mixed, weight)
    assert_equal(with_gradients(lambda x, w: cpu_kernels.rms_norm(x[..., HEAD_DIM:], w, 1e-6), mixed, weight), expected)


def test_rms_norm_of_a_frozen_weight_gives_it_no_gradient():
    x, weight = random(TOKENS, 32).requires_grad_(), random(32, seed=1)
    cpu_kernels.rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None and bool(x.grad.any())


def test_rms_norm_keeps_its_input_and_a_number_of_each_row():
    x, weight = random(TOKENS, 32).requires_grad_(), random(32, seed=1).requires_grad_()
    assert saved(lambda x: cpu_kernels.rms_norm(x, weight, 1e-6), x) == [(TOKENS, 1), (TOKENS, 32), (32,)]


def rotated_by_hand(x, angles, mscale):
    first, second = x.chunk(2, -1)
    cosines, sines = ((function(angles) * mscale).to(x.dtype) for function in (torch.cos, torch.sin))
    return x * cosines + torch.cat((-second, first), -1) * sines


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_rotation_is_the_formula(dtype, mscale):
    x, angles = random(TOKENS, 1, HEADS, HEAD_DIM, dtype=dtype), random(TOKENS, 1, 1, HEAD_DIM, seed=1)
    expected = with_gradients(lambda x: rotated_by_hand(x, angles, mscale), x)
    assert_equal(with_gradients(lambda x: cpu_kernels.rotated(x, angles, mscale), x), expected, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_swiglu_and_its_gradient_are_autograds(dtype):
    both = random(TOKENS, 1, 10, dtype=dtype)

    def by_hand(both):
        gate, linear = both.chunk(2, -1)
        return F.silu(gate) * linear

    out, grad = with_gradients(by_hand, both)
    upstream = random(*out.shape, dtype=dtype, seed=9)
    assert_equal([cpu_kernels.swiglu(both), cpu_kernels.swiglu_backward(upstream, both)], [out, grad], dtype)


def test_a_product_is_added():
    inputs, grads, total = random(TOKENS, 4), random(TOKENS, 5, seed=1), random(5, 4, seed=2)
    expected = total + grads.t() @ inputs
    cpu_kernels.add_product(inputs, grads, total)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)


def megatrons_functions(cp_size: int) -> list[float]:
    """Largest differences of Megatron-Core's RoPE and SwiGLU from what they were before they were replaced."""
    import megatron.core.fusions.fused_bias_swiglu as swiglu
    import megatron.core.models.common.embeddings.rope_utils as rope

    class Group:
        def size(self):
            return cp_size

        def rank(self):
            return cp_size - 1

    borders = torch.tensor([0, 8, 24])
    x, angles = random(24 // cp_size, HEADS, HEAD_DIM), random(24, 1, 1, HEAD_DIM, seed=1)
    part, interleaved = angles[..., : HEAD_DIM // 2], {"rotary_interleaved": True}
    rows = [
        function(x, borders, angles, cp_group=Group())
        for function in (rope._apply_rotary_pos_emb_thd, rope._apply_rotary_pos_emb_thd.__wrapped__)
    ]
    heads = [
        [
            function(random(24, 1, HEADS, HEAD_DIM), *arguments, **knobs)
            for arguments, knobs in (((angles,), {}), ((part,), {}), ((angles,), interleaved))
        ]
        for function in (rope._apply_rotary_pos_emb_bshd, rope._apply_rotary_pos_emb_bshd.__wrapped__)
    ]
    both = random(TOKENS, 10)
    gate, linear = both.chunk(2, -1)
    pairs = [rows, *zip(*heads, strict=True), (swiglu.bias_swiglu_impl(both, None), F.silu(gate) * linear)]
    return [float((ours - theirs).abs().max()) for ours, theirs in pairs]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_megatron_core_calls_is_what_it_was(workers: PoolKeeper, cp_size: int) -> None:
    (differences,) = workers(1).run("tests.unit.platform.test_cpu_kernels:megatrons_functions", cp_size=cp_size)
    assert differences == [0.0] * 5


def step_gradients(fused: bool) -> tuple[list[float], bool]:
    """Of two microbatches through a linear in DDP, added up; whether its gradient was added in the product."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megavlm.config.schema import ParallelConfig
    from megavlm.models.linear import ColumnLinear
    from megavlm.parallel.groups import initialize
    from megavlm.parallel.wrap import add_gradients_in_products

    groups = initialize(ParallelConfig()).language
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    linear = ColumnLinear(
        4, 6, config=config, init_method=config.init_method, bias=False, gather_output=False, tp_group=groups.tp
    )
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), linear, pg_collection=groups)
    if fused:
        add_gradients_in_products(wrapped)
    wrapped.zero_grad_buffer()
    for seed in (1, 2):
        output, _ = wrapped(random(TOKENS, 1, 4, seed=seed))
        output.backward(random(TOKENS, 1, 6, seed=seed + 2))
    weight = linear.weight
    return vars(weight)["main_grad"].flatten().tolist(), bool(vars(weight)["grad_added_to_main_grad"])


def test_linears_add_gradients_in_their_product(workers: PoolKeeper) -> None:
    name = "tests.unit.platform.test_cpu_kernels:step_gradients"
    (plain, added), (fused, added_in_product) = (workers(1).run(name, fused=value)[0] for value in (False, True))
    torch.testing.assert_close(torch.tensor(fused), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    assert not added and added_in_product
    expected = sum(random(TOKENS, 6, seed=seed + 2).t() @ random(TOKENS, 4, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(torch.tensor(fused), expected.flatten(), rtol=1e-5, atol=1e-6)
