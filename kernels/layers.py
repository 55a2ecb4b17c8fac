"""Parts of a decoder layer on a CPU, each one pass over memory: RMSNorm and the gated SiLU of an
MLP.

Eager PyTorch makes six passes of one and four of the other, and keeps what each of them wrote.

Shapes: D width; R rows, whatever dimensions they have.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels import native_backend
from kernels.checks import check_float32_on_cpu


def rms_norm(x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.

    Args:
        x: float32 [..., D] on the CPU.
        weight_D: float32.
        epsilon: added to the mean of squares.

    Returns: float32 [..., D].

    Raises:
        ValueError: another type, device or shape.
        RuntimeError: the C++ kernels cannot run here.
    """
    check_float32_on_cpu(x=x, weight=weight_D)
    if weight_D.dim() != 1 or x.shape[-1:] != weight_D.shape:
        raise ValueError(
            f"weight: expected [{x.shape[-1] if x.dim() else 'D'}] for x {list(x.shape)}, "
            f"got {list(weight_D.shape)}"
        )
    return _RmsNorm.apply(x, weight_D, epsilon)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(gate) * up.

    Source: Shazeer 2020, arXiv 2002.05202, equation 5 with SiLU.

    Args:
        gate, up: float32 of one shape, on the CPU.

    Returns: float32 of that shape.

    Raises:
        ValueError: another type or device, or shapes that differ.
        RuntimeError: the C++ kernels cannot run here.
    """
    check_float32_on_cpu(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"up: expected {list(gate.shape)} as gate, got {list(up.shape)}")
    return _GatedSilu.apply(gate, up)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        x, weight_D = x.contiguous(), weight_D.contiguous()
        out, inverse_R = native_backend.rms_norm(x, weight_D, epsilon)
        ctx.save_for_backward(x, weight_D, inverse_R)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, inverse_R = ctx.saved_tensors  # type: ignore[attr-defined]
        return *native_backend.rms_norm_backward(grad, x, weight_D, inverse_R), None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return native_backend.gated_silu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors  # type: ignore[attr-defined]
        return native_backend.gated_silu_backward(grad, gate, up)
