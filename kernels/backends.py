"""Which code runs an op: four backends in one literal table, and why one of them may be missing.

A backend is a module with the functions of `Backend`. One that is asked for and cannot run raises
and says why; nothing falls back to another. "auto" is fixed by device and dtype alone: the C++
kernels on a CPU, the reference for float64 (which only it computes), Triton on a GPU.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor

from kernels.spec import LossSpec, check_choice
from kernels.token_loss import FusedLoss, TokenBatch


class Backend(Protocol):
    """The functions of a backend; `reference` and `token_loss` document them, apart from the fused
    loss."""

    def row_stats(
        self,
        logits_OIW: Tensor,
        token_ids_N: Tensor,
        inv_temperature: Tensor | float,
        softcap: float,
    ) -> Tensor: ...

    def grad_logits(
        self,
        logits_OIW: Tensor,
        token_ids_N: Tensor,
        inv_temperature: Tensor | float,
        softcap: float,
        row_max_N: Tensor,
        log_sum_N: Tensor,
        entropy_N: Tensor,
        coef_logprob_N: Tensor,
        coef_entropy_N: Tensor,
        out_OIW: Tensor,
    ) -> None: ...

    def scale_(self, grad_OIW: Tensor, factor: Tensor) -> None: ...


class FusedBackend(Backend, Protocol):
    """A backend that computes losses over independent tokens in one launch."""

    def policy_loss(
        self,
        logits_OIW: Tensor,
        batch: TokenBatch,
        spec: LossSpec,
        inv_temperature: Tensor | float,
        softcap: float,
        out_OIW: Tensor | None,
    ) -> FusedLoss:
        """From raw rewards to loss, metrics and gradient, for unsharded logits.

        Writes d loss / d logits to `out_OIW`, which may be the logits themselves; None leaves the
        gradient out.
        """
        ...


def _reference_reason() -> str | None:
    return None


@cache
def _cpp_reason() -> str | None:
    return cast(str | None, import_module("kernels.native_backend").cpp_unavailable_reason())


def _triton_reason() -> str | None:
    if torch.version.hip is not None:
        return "not tried on ROCm yet"
    try:
        triton = import_module("triton")
    except ModuleNotFoundError as error:
        return f"triton is not installed ({error})"
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return None


def _cuda_reason() -> str | None:
    return cast(str | None, import_module("kernels.cuda_backend").unavailable_reason())


UNAVAILABLE_REASON: dict[str, Callable[[], str | None]] = {
    "reference": _reference_reason,
    "cpp": _cpp_reason,
    "triton": _triton_reason,
    "cuda": _cuda_reason,
}
MODULE = {
    "reference": "kernels.reference",
    "cpp": "kernels.native_backend",
    "triton": "kernels.triton_backend",
    "cuda": "kernels.cuda_backend",
}
DTYPES = {
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cpp": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def available_backends() -> dict[str, str]:
    """For each backend "available", or the reason why it cannot run in this process."""
    return {name: reason() or "available" for name, reason in UNAVAILABLE_REASON.items()}


@cache
def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run an op on logits of this device and dtype.

    Raises:
        ValueError: an unknown name, or a device or dtype that the backend does not take.
        RuntimeError: the backend cannot run in this process; the message says why.
    """
    check_choice("backend", name, ("auto", *UNAVAILABLE_REASON))
    on_cpu = device.type == "cpu"
    if name == "auto":
        name = "reference" if dtype == torch.float64 else "cpp" if on_cpu else "triton"
    reason = UNAVAILABLE_REASON[name]()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if name == "cpp" and not on_cpu:
        raise ValueError(f"backend 'cpp': expected logits on the CPU, got {device}")
    if on_cpu and (name == "cuda" or (name == "triton" and not _triton_interprets())):
        raise ValueError(f"backend {name!r}: expected logits on a GPU, got {device}")
    if dtype not in DTYPES[name]:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES[name])
        raise ValueError(f"logits: expected dtype {names} for backend {name!r}, got {dtype}")
    return name


@cache
def load_backend(name: str) -> ModuleType:
    """The module behind a name that `select_backend` returned."""
    return import_module(MODULE[name])


def _triton_interprets() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)
