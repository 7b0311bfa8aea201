"""What are fused kernels on a GPU, in few passes over memory on a CPU.

Written operation by operation, RMSNorm makes a tensor of each, RoPE and SwiGLU put halves together in a new tensor
again and again, and their backward passes fill whole tensors with zeros to add a half to them. Of a training step of a
hidden size of 512 on one core that was a tenth. Here each half is written where it belongs, and less is kept: what a
norm or SwiGLU takes, not what becomes of it on the way. Forward passes give the same to the last bit, gradients but for
the rounding of sums of products.

Shape suffixes: T tokens, B batch (1), N heads, D head dim, F inner width of an MLP, I, O input and output of a linear.
"""

from typing import Any

import torch
import torch.nn.functional as F


class _RMSNorm(torch.autograd.Function):
    """Keeps x and each row's factor, no normalised copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows = x.float()
        squares = rows * rows  # a norm of each row would be quicker by a pass, and round more
        factors = squares.mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, factors, weight)
        return torch.mul(rows, factors, out=squares).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        # y_i = w_i f x_i, f = (mean(x^2) + e)^-1/2: dx = f (w g) - f^3 mean(w g x) x, and dw = sum over rows of g f x
        x, factors, weight = ctx.saved_tensors
        grad, rows, scale = grads[0].float(), x.float(), weight.float()
        products = grad * rows
        means = (products @ scale).unsqueeze(-1).mul_(factors**3).div_(-x.shape[-1])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = products.mul_(factors).flatten(0, -2).sum(0).to(weight.dtype)
        grad_x = torch.mul(grad, scale, out=products).mul_(factors).addcmul_(rows, means)
        return grad_x.to(x.dtype), grad_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, in fp32 arithmetic.

    Source: Zhang & Sennrich, arXiv 1910.07467, equation 4.

    Args:
        x: of any floating type, which the result has too.
        weight: one number for each channel.
        epsilon: added to the mean of squares.
    """
    out: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)
    return out


class _Rotation(torch.autograd.Function):
    """x cos + (-x2, x1) sin of halves (x1, x2); keeps cosines and sines, no x."""

    @staticmethod
    def forward(ctx: Any, x_TBND: torch.Tensor, cos_TBND: torch.Tensor, sin_TBND: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_TBND, sin_TBND)
        out_TBND = x_TBND * cos_TBND
        (first, second), (sin_1, sin_2) = x_TBND.chunk(2, -1), sin_TBND.chunk(2, -1)
        out_1, out_2 = out_TBND.chunk(2, -1)
        out_1.sub_(second * sin_1)
        out_2.add_(first * sin_2)
        return out_TBND

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        cos_TBND, sin_TBND = ctx.saved_tensors
        grad_TBND = grads[0] * cos_TBND
        (first, second), (sin_1, sin_2) = grads[0].chunk(2, -1), sin_TBND.chunk(2, -1)
        grad_1, grad_2 = grad_TBND.chunk(2, -1)
        grad_1.addcmul_(second, sin_2)
        grad_2.addcmul_(first, sin_1, value=-1)
        return grad_TBND, None, None


def rotated(x_TBND: torch.Tensor, angles_TBND: torch.Tensor, mscale: float) -> torch.Tensor:
    """Rotary embedding of whole heads, whose second half turns with the first.

    Args:
        x_TBND: queries or keys, any floating type.
        angles_TBND: fp32, broadcast over heads.
        mscale: what cosines and sines are multiplied by (YaRN).
    """
    cosines, sines = ((function(angles_TBND) * mscale).to(x_TBND.dtype) for function in (torch.cos, torch.sin))
    out: torch.Tensor = _Rotation.apply(x_TBND, cosines, sines)
    return out


def add_product(input_TI: torch.Tensor, grad_TO: torch.Tensor, total_OI: torch.Tensor) -> None:
    """Add the gradient of a linear's weight to the step's, in place: of apex's wgrad_gemm_accum_fp32, in fp32.

    Args:
        input_TI: of the linear.
        grad_TO: of its output.
        total_OI: what is added to.
    """
    total_OI.addmm_(grad_TO.t(), input_TI)


def swiglu(both_T2F: torch.Tensor) -> torch.Tensor:
    """silu(gate) * linear of halves (gate, linear) of the last dimension; not differentiated by autograd."""
    gate_TF, linear_TF = both_T2F.chunk(2, -1)
    return F.silu(gate_TF).mul_(linear_TF)


def swiglu_backward(grad_TF: torch.Tensor, both_T2F: torch.Tensor) -> torch.Tensor:
    """The gradient of `both_T2F`, from that of what `swiglu` gave."""
    gate_TF, linear_TF = both_T2F.chunk(2, -1)
    grad_T2F = torch.empty_like(both_T2F)
    grad_gate_TF, grad_linear_TF = grad_T2F.chunk(2, -1)
    torch.mul(F.silu(gate_TF), grad_TF, out=grad_linear_TF)
    torch.mul(grad_TF, linear_TF, out=grad_gate_TF)
    torch.ops.aten.silu_backward.grad_input(grad_gate_TF, gate_TF, grad_input=grad_gate_TF)
    return grad_T2F
