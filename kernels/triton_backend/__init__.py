"""Triton backend: `row_stats`, `grad_logits`, `scale_`, and `policy_loss` fused into one launch.

The functions of `backends.FusedBackend`; `reference` defines their results. Nothing here waits for
the GPU. A row of logits is read twice and its gradient written once; the rest is O(N).

The fused kernel splits a row over PARTS programs and writes a row's gradient soon after it was
read, so that the second reading finds the row in the L2 cache: some 2 * rows_ahead rows are between
their two readings at a time.

Tried without a GPU: compiled for sm_80, sm_90 and sm_100, where no kernel spills, and run in the
interpreter, whose programs run one after the other. Tile sizes follow from register counts; they,
PARTS and PROGRAMS_PER_SM were not tuned on a GPU. A row does a few
exp and log in float64, which a GPU with little float64 hardware may feel at a small vocabulary.
Shape legend: `reference.py`.
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import token_loss
from kernels.loss_metrics import loss_metrics
from kernels.spec import LossSpec
from kernels.token_loss import FusedLoss, TokenBatch
from kernels.triton_backend import programs

# Loads a thread has in flight, and folds together before it rebases its running sums.
DEPTH = 4
LOAD_BYTES = 16
WARP_SIZE = 32
MAX_WARPS = 8
ALIGNMENT = 16
# All that a thread can have: with a soft cap ptxas would rather leave some on the stack, in vain,
# to fit a second program on a multiprocessor.
MAX_REGISTERS = 255
MAX_PARTS = 4
PROGRAMS_PER_SM = 2


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """First pass: float32 [4, N] row maximum, sum of exp, weighted sum, target logit.

    See `reference.row_stats`.
    """
    stats_4N = logits_OIW.new_empty((4, len(token_ids_N)), dtype=torch.float32)
    _launch(
        programs.row_stats_kernel,
        {"logits": logits_OIW},
        token_ids_ptr=token_ids_N.contiguous(),
        stats_ptr=stats_4N,
        PARTS=_row_parts(logits_OIW),
        **_scaling(inv_temperature, softcap),
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
    """Second pass: writes d loss / d logits to `out_OIW`. See `reference.grad_logits`."""
    _launch(
        programs.grad_logits_kernel,
        {"logits": logits_OIW, "out": out_OIW},
        token_ids_ptr=token_ids_N.contiguous(),
        row_max_ptr=row_max_N.contiguous(),
        log_sum_ptr=log_sum_N.contiguous(),
        entropy_ptr=entropy_N.contiguous(),
        coef_logprob_ptr=coef_logprob_N.contiguous(),
        coef_entropy_ptr=coef_entropy_N.contiguous(),
        **_scaling(inv_temperature, softcap),
    )


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place; where that is 1, reads nothing else."""
    _launch(programs.scale_kernel, {"grad": grad_OIW}, factor_ptr=factor)


def policy_loss(
    logits_OIW: Tensor,
    batch: TokenBatch,
    spec: LossSpec,
    inv_temperature: Tensor | float,
    softcap: float,
    out_OIW: Tensor | None,
) -> FusedLoss:
    """Loss over independent tokens, metrics and gradient with one launch over the logits.

    Args:
        logits_OIW: a view [outer, inner, V] with last stride 1.
        batch: token ids >= 0 or IGNORED.
        spec: a loss for which `token_loss.tokens_are_independent` holds.
        inv_temperature: number, or float32 [N].
        softcap: tanh soft cap of the logits; 0 for none.
        out_OIW: receives d loss / d logits, may be the logits; None computes no gradient.

    Returns:
        Loss, log-probs, entropy and metrics, float32.
    """
    terms = token_loss.token_terms(batch, spec)
    advantages_N, sampler_logprobs_N = terms.advantages_N, None
    if terms.sampler_weight_N is not None:
        weighted_N = advantages_N * terms.sampler_weight_N
        advantages_N = torch.where(advantages_N == 0, 0.0, weighted_N)
    elif spec.sampler_correction != "none":
        sampler_logprobs_N = terms.sampler_logprobs_N
    logprobs_N = logits_OIW.new_empty(len(advantages_N), dtype=torch.float32)
    entropy_N = torch.empty_like(logprobs_N)
    coef_logprob_N = torch.empty_like(advantages_N)
    num_rows, parts = len(advantages_N), _row_parts(logits_OIW)
    num_programs = PROGRAMS_PER_SM * _num_multiprocessors(logits_OIW.device)
    rows_ahead = max(1, num_programs // (2 * parts))
    counters = torch.zeros(num_rows + 1, dtype=torch.int64, device=logits_OIW.device)
    _launch(
        programs.policy_loss_kernel,
        {"logits": logits_OIW, "out": out_OIW},
        num_programs=min(num_programs, (num_rows + rows_ahead) * 2 * parts),
        sums_ptr=logits_OIW.new_empty(
            (num_rows, parts, programs.NUM_SUMS.value), dtype=torch.float32
        ),
        parts_read_ptr=counters[1:],
        next_task_ptr=counters[:1],
        num_rows=num_rows,
        rows_ahead=rows_ahead,
        PARTS=parts,
        token_ids_ptr=batch.token_ids_N.contiguous(),
        advantages_ptr=advantages_N,
        weights_ptr=terms.weights_N,
        old_logprobs_ptr=terms.old_logprobs_N,
        ref_logprobs_ptr=terms.ref_logprobs_N,
        sampler_logprobs_ptr=sampler_logprobs_N,
        logprobs_ptr=logprobs_N,
        entropy_ptr=entropy_N,
        coef_logprob_ptr=coef_logprob_N,
        **_scaling(inv_temperature, softcap),
        **_loss_arguments(spec),
    )
    coef_entropy_N = -spec.entropy_weight * terms.weights_N
    loss = token_loss.objective(logprobs_N.double(), entropy_N.double(), terms, spec)
    metrics = loss_metrics(
        logprobs_N, entropy_N, coef_logprob_N, coef_entropy_N, batch, terms, spec
    )
    return FusedLoss(loss=loss.float(), logprobs_N=logprobs_N, entropy_N=entropy_N, metrics=metrics)


def _launch(
    kernel: Any,
    tensors_OIW: dict[str, Tensor | None],
    *,
    num_programs: int | None = None,
    **arguments: Any,
) -> None:
    """Runs one program a row, if nothing else is said, on the device of the first tensor, which
    gives the shape.

    Each tensor goes to the kernel as `<name>_ptr`, `<name>_stride_outer` and `<name>_stride_inner`.
    """
    first_OIW = next(iter(tensors_OIW.values()))
    assert first_OIW is not None
    outer, inner, width = first_OIW.shape
    if outer * inner == 0:
        return
    strides = {}
    for name, tensor_OIW in tensors_OIW.items():
        for dim, axis in enumerate(("outer", "inner")):
            strides[f"{name}_stride_{axis}"] = 0
            # The stride of a dimension of size 1 says nothing, and would only vary the alignment.
            if tensor_OIW is not None and tensor_OIW.shape[dim] > 1:
                strides[f"{name}_stride_{axis}"] = tensor_OIW.stride(dim)
    lanes, num_warps = _lanes(first_OIW)
    with torch.cuda.device_of(first_OIW):
        kernel[(num_programs or outer * inner,)](
            **{f"{name}_ptr": tensor_OIW for name, tensor_OIW in tensors_OIW.items()},
            **strides,
            **arguments,
            width=width,
            inner=inner,
            ALIGNED=all(stride % ALIGNMENT == 0 for stride in strides.values()),
            LANES=lanes,
            DEPTH=DEPTH,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS if arguments.get("HAS_SOFTCAP") else None,
            enable_fp_fusion=False,
        )


def _lanes(logits_OIW: Tensor) -> tuple[int, int]:
    """Columns that the threads of a program load at once, and its warps."""
    lanes_per_warp = WARP_SIZE * LOAD_BYTES // logits_OIW.element_size()
    wanted = triton.next_power_of_2(triton.cdiv(logits_OIW.shape[-1], DEPTH * lanes_per_warp))
    num_warps = min(wanted, MAX_WARPS)
    return lanes_per_warp * num_warps, num_warps


def _row_parts(logits_OIW: Tensor) -> int:
    """Parts in which a row is summed, a power of two; given by dtype and width alone."""
    lanes, _ = _lanes(logits_OIW)
    tiles = triton.cdiv(logits_OIW.shape[-1], DEPTH * lanes)
    return min(MAX_PARTS, triton.next_power_of_2(tiles))


def _num_multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _scaling(inv_temperature: Tensor | float, softcap: float) -> dict[str, Any]:
    """Kernel arguments for the temperature, one for all rows or one a row, and the soft cap."""
    per_row_N, number = None, 1.0
    if isinstance(inv_temperature, Tensor):
        per_row_N = inv_temperature.float().contiguous()
    else:
        number = float(inv_temperature)
    return {
        "inv_temperatures_ptr": per_row_N,
        "inv_temperature": number,
        "softcap": float(softcap),
        "HAS_SOFTCAP": softcap > 0,
    }


def _loss_arguments(spec: LossSpec) -> dict[str, Any]:
    """Kernel arguments for the terms of a loss and its bounds; an absent bound is infinite."""
    cap = math.inf if spec.ratio_cap is None else spec.ratio_cap
    dual = math.inf if spec.dual_clip is None else spec.dual_clip
    return {
        "lower": 1.0 - spec.clip_low,
        "upper_positive": min(1.0 + spec.clip_high, cap),
        "upper_negative": min(dual, cap),
        "temperature_positive": float(spec.sapo_temperature_pos),
        "temperature_negative": float(spec.sapo_temperature_neg),
        "sampler_low": 0.0 if spec.sampler_low is None else float(spec.sampler_low),
        "sampler_high": math.inf if spec.sampler_high is None else float(spec.sampler_high),
        "kl_weight": float(spec.kl_weight),
        "entropy_weight": float(spec.entropy_weight),
        "SURROGATE": spec.surrogate,
        "KL": spec.kl if spec.kl_weight != 0 else "none",
        "KL_RATIO_WEIGHTED": spec.kl_ratio_weighted,
        "SAMPLER_MASK": spec.sampler_correction.endswith("_mask"),
        "HAS_ENTROPY": spec.entropy_weight != 0,
    }
