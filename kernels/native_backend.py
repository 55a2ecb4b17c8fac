"""The `cpp` backend: hands tensors to the C++ kernels as addresses, sizes and strides.

Allocates the outputs and nothing else; `csrc/` computes. It also binds the CUDA kernels that exist
so far. The functions have the signatures of `kernels.backends.Backend` and leave validation to
`kernels.ops`.

Shapes as in `kernels.reference`: N packed tokens, W this rank's columns of the vocabulary, S
sequences, logits_OIW a view [outer, inner, W] of the logits with N = outer * inner.
"""

import math
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.loss_metrics import METRIC_NAMES
from kernels.spec import LossSpec
from kernels.token_loss import FusedLoss, TokenBatch


def _import_extension(name: str) -> ModuleType | str:
    """The compiled module, or in one sentence why it cannot be imported."""
    try:
        return import_module(f"kernels.{name}")
    except ImportError as error:
        return f"the compiled module kernels.{name} cannot be imported ({error})"


_NATIVE = _import_extension("_native")
_CUDA = _import_extension("_cuda")


def cpp_unavailable_reason() -> str | None:
    """Why the C++ kernels cannot run in this process; None where they can."""
    return _NATIVE if isinstance(_NATIVE, str) else None


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot run in this process; None where they can."""
    if isinstance(_CUDA, str):
        return f"{_CUDA}; it is built where nvcc is found, ONEPASS_CUDA=1 insists on it"
    return None if torch.cuda.is_available() else "no CUDA device"


def _native() -> Any:
    if isinstance(_NATIVE, str):
        raise RuntimeError(_NATIVE)
    return _NATIVE


def _view(native: Any, logits_OIW: Tensor) -> Any:
    dtype = getattr(native.DType, str(logits_OIW.dtype).removeprefix("torch."))
    return native.LogitsView(logits_OIW.data_ptr(), dtype, logits_OIW.shape, logits_OIW.stride())


def _float32(inv_temperature: Tensor | float) -> Tensor | float:
    if isinstance(inv_temperature, Tensor):
        return inv_temperature.to(torch.float32).contiguous()
    return inv_temperature


def _row_scale(native: Any, inv_temperature: Tensor | float, softcap: float) -> Any:
    """Takes the address of a tensor, which the caller keeps alive."""
    if isinstance(inv_temperature, Tensor):
        return native.RowScale(inv_temperature.data_ptr(), 1.0, softcap)
    return native.RowScale(0, inv_temperature, softcap)


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """Row maximum, sum of exp, weighted sum and target logit, float32 [4, N]; see `reference`."""
    native = _native()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = _float32(inv_temperature)
    stats_4N = torch.empty(4, len(token_ids_N), dtype=torch.float32)
    native.row_stats(
        _view(native, logits_OIW),
        token_ids_N.data_ptr(),
        _row_scale(native, inv_temperature, softcap),
        stats_4N.data_ptr(),
        torch.get_num_threads(),
    )
    return stats_4N


def row_stats_cuda(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """`row_stats` of the CUDA kernel, on the logits' device and its current stream."""
    if isinstance(_CUDA, str):
        raise RuntimeError(_CUDA)
    device = logits_OIW.device
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = _float32(inv_temperature)
    stats_4N = torch.empty(4, len(token_ids_N), dtype=torch.float32, device=device)
    _CUDA.row_stats(
        _view(_CUDA, logits_OIW),
        token_ids_N.data_ptr(),
        _row_scale(_CUDA, inv_temperature, softcap),
        stats_4N.data_ptr(),
        device.index,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return stats_4N


def grad_logits(
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
) -> None:
    """Writes the gradient of the logits to `out_OIW`, which may be the logits; see `reference`."""
    native = _native()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = _float32(inv_temperature)
    inputs = [
        values_N.to(torch.float32).contiguous()
        for values_N in (row_max_N, log_sum_N, entropy_N, coef_logprob_N, coef_entropy_N)
    ]
    native.grad_logits(
        _view(native, logits_OIW),
        token_ids_N.data_ptr(),
        _row_scale(native, inv_temperature, softcap),
        *(values_N.data_ptr() for values_N in inputs),
        _view(native, out_OIW),
        torch.get_num_threads(),
    )


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place; leaves it alone for a factor of 1."""
    native = _native()
    native.scale_rows(_view(native, grad_OIW), factor.item(), torch.get_num_threads())


@lru_cache(maxsize=64)
def _native_spec(spec: LossSpec) -> Any:
    native = _native()
    native_spec = native.LossSpec()
    for field, enum in (
        ("surrogate", native.Surrogate),
        ("kl", native.KlEstimator),
        ("aggregation", native.Aggregation),
        ("advantage_scale", native.AdvantageScale),
        ("sampler_correction", native.SamplerCorrection),
    ):
        setattr(native_spec, field, getattr(enum, getattr(spec, field)))
    for field in (
        "clip_low",
        "clip_high",
        "sapo_temperature_pos",
        "sapo_temperature_neg",
        "kl_weight",
        "kl_ratio_weighted",
        "entropy_weight",
        "advantage_ddof",
        "advantage_eps",
    ):
        setattr(native_spec, field, getattr(spec, field))
    # An absent bound is an infinite one; an absent lower bound of a positive weight is 0.
    for field in ("dual_clip", "ratio_cap", "sampler_high"):
        value = getattr(spec, field)
        setattr(native_spec, field, math.inf if value is None else value)
    native_spec.sampler_low = 0.0 if spec.sampler_low is None else spec.sampler_low
    native_spec.max_tokens = 1.0 if spec.max_tokens is None else float(spec.max_tokens)
    return native_spec


def _float64(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.detach().to(torch.float64).contiguous()


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def policy_loss(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float,
    softcap: float,
    out_OIW: Tensor | None,
) -> FusedLoss:
    """From raw rewards or advantages to loss, metrics and gradient, reading each row once.

    Writes d loss / d logits to `out_OIW`, which may be the logits; None leaves it out.
    """
    native = _native()
    assert native.NUM_POLICY_METRICS == len(METRIC_NAMES)
    num_tokens = len(batch.token_ids_N)
    token_ids_N, offsets = batch.token_ids_N.contiguous(), batch.offsets.contiguous()
    inv_temperature = _float32(inv_temperature)
    old, ref, sampler, advantages, rewards = (
        _float64(values)
        for values in (
            batch.old_logprobs_N,
            batch.ref_logprobs_N,
            batch.sampler_logprobs_N,
            batch.advantages_N,
            batch.rewards_S,
        )
    )
    loss = torch.empty((), dtype=torch.float32)
    logprobs_N = torch.empty(num_tokens, dtype=torch.float32)
    entropy_N = torch.empty_like(logprobs_N)
    metrics = torch.empty(len(METRIC_NAMES), dtype=torch.float32)
    native.policy_loss(
        _view(native, logits_OIW),
        _row_scale(native, inv_temperature, softcap),
        _native_spec(spec),
        token_ids=token_ids_N.data_ptr(),
        offsets=offsets.data_ptr(),
        num_sequences=len(offsets) - 1,
        old_logprobs=_address(old),
        ref_logprobs=_address(ref),
        sampler_logprobs=_address(sampler),
        advantages=_address(advantages),
        rewards=_address(rewards),
        group_size=batch.group_size or 0,
        denominator=0.0 if batch.denominator is None else float(batch.denominator),
        loss=loss.data_ptr(),
        logprobs=logprobs_N.data_ptr(),
        entropy=entropy_N.data_ptr(),
        metrics=metrics.data_ptr(),
        grad=None if out_OIW is None else _view(native, out_OIW),
        threads=torch.get_num_threads(),
    )
    return FusedLoss(loss=loss, logprobs_N=logprobs_N, entropy_N=entropy_N, metrics=metrics)
