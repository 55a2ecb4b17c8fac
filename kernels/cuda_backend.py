"""The `cuda` backend: hands tensors to the CUDA kernels as addresses, sizes and strides.

Allocates outputs and scratch through PyTorch, on the logits' device and its current stream, and
never waits for the GPU, so that CUDA graphs can capture every call; `csrc/cuda` computes. The
functions have the signatures of `kernels.backends.FusedBackend` and leave validation to
`kernels.ops`. A GPU of compute capability 9.0 or more reads a row of logits once; others, and rows
that fit no cluster, read it twice where a gradient is written.

Shapes as in `kernels.reference`: N packed tokens, W this rank's columns of the vocabulary, S
sequences, logits_OIW a view [outer, inner, W] of the logits with N = outer * inner.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.loss_metrics import METRIC_NAMES
from kernels.native_arguments import (
    address,
    float32,
    import_extension,
    loss_spec,
    row_scale,
    view,
)
from kernels.spec import LossSpec
from kernels.token_loss import FusedLoss, TokenBatch

_CUDA = import_extension("_cuda")


def unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot run in this process; None where they can."""
    if isinstance(_CUDA, str):
        return f"{_CUDA}; it is built where nvcc is found, ONEPASS_CUDA=1 insists on it"
    return None if torch.cuda.is_available() else "no CUDA device"


def _cuda() -> Any:
    if isinstance(_CUDA, str):
        raise RuntimeError(_CUDA)
    return _CUDA


def _stream(cuda: Any, device: torch.device) -> Any:
    return cuda.Stream(device.index, torch.cuda.current_stream(device).cuda_stream)


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """Row maximum, sum of exp, weighted sum and target logit, float32 [4, N]; see `reference`."""
    stats_4N = torch.empty(4, len(token_ids_N), dtype=torch.float32, device=logits_OIW.device)
    rows = list(stats_4N)
    _statistics(logits_OIW, token_ids_N, inv_temperature, softcap, rows, finished=False)
    return stats_4N


def row_values(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, maximum and log of the sum of exp(z - maximum) of whole rows, float32
    [N]: what `passes.finish_stats` makes of `row_stats`, in the same launch."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits_OIW.device}
    logprobs_N, entropy_N, max_N, log_sum_N = (
        torch.empty(len(token_ids_N), **options) for _ in range(4)
    )
    values = [logprobs_N, entropy_N, max_N, log_sum_N]
    _statistics(logits_OIW, token_ids_N, inv_temperature, softcap, values, finished=True)
    return logprobs_N, entropy_N, max_N, log_sum_N


def _statistics(
    logits_OIW: Tensor,
    token_ids_N: Tensor,
    inv_temperature: Tensor | float,
    softcap: float,
    out: list[Tensor],
    *,
    finished: bool,
) -> None:
    cuda = _cuda()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = float32(inv_temperature)
    cuda.row_stats(
        view(cuda, logits_OIW),
        token_ids_N.data_ptr(),
        row_scale(cuda, inv_temperature, softcap),
        [values_N.data_ptr() for values_N in out],
        finished,
        _stream(cuda, logits_OIW.device),
    )


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
    cuda = _cuda()
    token_ids_N = token_ids_N.contiguous()
    inv_temperature = float32(inv_temperature)
    inputs = [
        values_N.to(torch.float32).contiguous()
        for values_N in (row_max_N, log_sum_N, entropy_N, coef_logprob_N, coef_entropy_N)
    ]
    cuda.grad_logits(
        view(cuda, logits_OIW),
        token_ids_N.data_ptr(),
        row_scale(cuda, inv_temperature, softcap),
        *(values_N.data_ptr() for values_N in inputs),
        view(cuda, out_OIW),
        _stream(cuda, logits_OIW.device),
    )


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place; leaves it alone for a factor of 1."""
    cuda = _cuda()
    factor = factor.to(grad_OIW.device, torch.float32)
    cuda.scale_rows(view(cuda, grad_OIW), factor.data_ptr(), _stream(cuda, grad_OIW.device))


def _float32_or_64(values: Tensor | None) -> Tensor | None:
    if values is None:
        return None
    values = values.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.to(torch.float64)
    return values.contiguous()


def _numbers(cuda: Any, values: Tensor | None) -> Any:
    return cuda.Numbers(address(values), values is not None and values.dtype == torch.float64)


def _denominator(value: Tensor | float | None, device: torch.device) -> Tensor | None:
    """0-d float64 on the device; a number gets there by a fill, which does not wait for it."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().to(torch.float64)
    if value is None:
        return None
    return torch.full((), float(value), dtype=torch.float64, device=device)


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
    cuda = _cuda()
    assert cuda.NUM_POLICY_METRICS == len(METRIC_NAMES)
    device = logits_OIW.device
    num_tokens, num_sequences = len(batch.token_ids_N), len(batch.offsets) - 1
    token_ids_N, offsets = batch.token_ids_N.contiguous(), batch.offsets.contiguous()
    inv_temperature = float32(inv_temperature)
    old, ref, sampler, advantages, rewards = (
        _float32_or_64(values)
        for values in (
            batch.old_logprobs_N,
            batch.ref_logprobs_N,
            batch.sampler_logprobs_N,
            batch.advantages_N,
            batch.rewards_S,
        )
    )
    denominator = _denominator(batch.denominator, device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    logprobs_N = torch.empty(num_tokens, dtype=torch.float32, device=device)
    entropy_N = torch.empty_like(logprobs_N)
    metrics = torch.empty(len(METRIC_NAMES), dtype=torch.float32, device=device)
    workspace = torch.empty(
        cuda.policy_workspace_bytes(num_tokens, num_sequences), dtype=torch.uint8, device=device
    )
    cuda.policy_loss(
        view(cuda, logits_OIW),
        row_scale(cuda, inv_temperature, softcap),
        loss_spec(cuda, spec),
        token_ids=token_ids_N.data_ptr(),
        offsets=offsets.data_ptr(),
        num_sequences=num_sequences,
        old_logprobs=_numbers(cuda, old),
        ref_logprobs=_numbers(cuda, ref),
        sampler_logprobs=_numbers(cuda, sampler),
        advantages=_numbers(cuda, advantages),
        rewards=_numbers(cuda, rewards),
        group_size=batch.group_size or 0,
        denominator=address(denominator),
        loss=loss.data_ptr(),
        logprobs=logprobs_N.data_ptr(),
        entropy=entropy_N.data_ptr(),
        metrics=metrics.data_ptr(),
        grad=None if out_OIW is None else view(cuda, out_OIW),
        workspace=workspace.data_ptr(),
        stream=_stream(cuda, device),
    )
    return FusedLoss(loss=loss, logprobs_N=logprobs_N, entropy_N=entropy_N, metrics=metrics)
