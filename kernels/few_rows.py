"""A linear layer for the few rows of a decoding step on a CPU.

Shapes: R rows, D input width, V outputs.
"""

import torch
from torch import Tensor

from kernels import native_backend
from kernels.checks import check_contiguous, check_float32_on_cpu


def few_rows_linear(x: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` without a gradient, for a few rows of x.

    BLAS packs the weights before it multiplies, which pays for many rows only. Here each weight is
    read once, where it lies. A row's result is the same bits whatever rows are beside it.

    Args:
        x: float32 [..., D] on the CPU.
        weight_VD: float32, contiguous.
        bias_V: float32, contiguous.

    Returns: float32 [..., V].

    Raises:
        ValueError: another type, device, layout or shape, or a gradient is asked for.
        RuntimeError: the C++ kernels cannot run here.
    """
    check_float32_on_cpu(x=x, weight=weight_VD, bias=bias_V)
    check_contiguous(weight=weight_VD, bias=bias_V)
    for name, tensor in (("x", x), ("weight", weight_VD), ("bias", bias_V)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected no gradient to be asked for, got requires_grad=True"
            )
    if weight_VD.dim() != 2 or x.shape[-1:] != weight_VD.shape[1:]:
        raise ValueError(
            f"weight: expected [V, {x.shape[-1] if x.dim() else 'D'}] for x {list(x.shape)}, "
            f"got {list(weight_VD.shape)}"
        )
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        raise ValueError(f"bias: expected [{len(weight_VD)}], got {list(bias_V.shape)}")
    return native_backend.few_rows_linear(x, weight_VD, bias_V)
