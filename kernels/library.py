"""The ops as `torch.library` custom ops: opaque to tracing, with fakes that know their shapes.

Those on hidden states are in `linear_library.py`. An op takes the caller's tensors and checks every
argument when it runs; `autograd` makes it differentiable. A gradient is written into memory that
the caller gives, which may be the logits themselves. Numbers that change from step to step
(temperature, clip bounds, denominator) come as tensors on the CPU, so that torch.compile does not
compile anew for each value. Shape legend: `ops.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter

from kernels import advantages, passes
from kernels.backends import load_backend, select_backend
from kernels.checks import (
    check_group_size,
    checked_batch,
    checked_layout,
    checked_rows,
    checked_scaling,
)
from kernels.loss_metrics import METRIC_NAMES
from kernels.passes import RowValues
from kernels.reference import compute_dtype
from kernels.sharding import VocabShard, localize
from kernels.spec import LossSpec, check_choice
from kernels.token_loss import with_unit_weights


def run(op: CustomOpDef, *arguments: Any) -> Any:
    """Calls the body of an op, or the op itself where tracing or fake tensors need it.

    The body alone saves a call what the dispatch of a custom op costs in Python, and what its
    outputs would hold in memory.
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and type(argument) not in PLAIN_TENSORS:
            return op(*arguments)
    return op._init_fn(*arguments)


PLAIN_TENSORS = (Tensor, Parameter)
FourTensors = tuple[Tensor, Tensor, Tensor, Tensor]
FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("onepass_rl::token_logprobs", mutates_args=())
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    shard: list[int],
    shard_group: str,
    backend: str,
) -> FourTensors:
    """Log-prob, entropy, row maximum and log of the sum of exp(z - maximum), like `token_ids`."""
    backend = select_backend(backend, logits.device, logits.dtype)
    vocab = VocabShard.from_parts(shard, shard_group)
    rows = checked_rows(logits, token_ids, None, vocab, logits.shape[-1] if vocab is None else None)
    scaling = checked_scaling(temperature, token_ids, softcap)
    values = passes.row_values(
        checked_layout(logits), localize(rows.token_ids_N, vocab), scaling, vocab, backend
    )
    logprobs, entropy, row_max, log_sum = (value_N.view(token_ids.shape) for value_N in values)
    return logprobs, entropy, row_max, log_sum


@token_logprobs.register_fake
def _(logits: Tensor, token_ids: Tensor, *rest: object) -> FourTensors:
    dtype = compute_dtype(logits)
    one, two, three, four = (logits.new_empty(token_ids.shape, dtype=dtype) for _ in range(4))
    return one, two, three, four


@torch.library.custom_op("onepass_rl::token_logprobs_gradient", mutates_args=("gradient",))
def token_logprobs_gradient(
    gradient: Tensor,
    logits: Tensor,
    token_ids: Tensor,
    temperature: Tensor,
    softcap: float,
    shard: list[int],
    shard_group: str,
    backend: str,
    values: list[Tensor],
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
) -> None:
    """Writes the gradient of the logits; `values` are the results of `token_logprobs`."""
    vocab = VocabShard.from_parts(shard, shard_group)
    passes.write_gradient(
        checked_layout(logits),
        localize(token_ids.reshape(-1).long(), vocab),
        checked_scaling(temperature, token_ids, softcap),
        RowValues(*(value.reshape(-1) for value in values)),
        (grad_logprobs.reshape(-1), grad_entropy.reshape(-1)),
        vocab,
        select_backend(backend, logits.device, logits.dtype),
        checked_layout(gradient, inplace=True),
    )


@torch.library.custom_op("onepass_rl::policy_loss", mutates_args=("gradient",))
def policy_loss(
    gradient: Tensor | None,
    logits: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    group_size: int | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    spec_choices: str,
    spec_numbers: Tensor,
    temperature: Tensor,
    softcap: float,
    shard: list[int],
    shard_group: str,
    backend: str,
) -> FiveTensors:
    """Loss, log-probs, entropy, metrics and a unit; writes the gradient of the logits if wanted.

    The gradient is the one written times the unit: 1 but for float16, which would round small
    gradients away before a loss scaler can make them larger.
    """
    backend = select_backend(backend, logits.device, logits.dtype)
    vocab = VocabShard.from_parts(shard, shard_group)
    rows = checked_rows(logits, token_ids, mask, vocab, logits.shape[-1] if vocab is None else None)
    scaling = checked_scaling(temperature, token_ids, softcap)
    spec = LossSpec.from_parts(spec_choices, spec_numbers)
    batch = checked_batch(
        rows,
        spec,
        vocab,
        cu_seqlens=cu_seqlens,
        advantages=advantages,
        rewards=rewards,
        group_size=group_size,
        denominator=denominator,
        per_token={
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampler_logprobs": sampler_logprobs,
        },
    )
    unit = torch.ones((), dtype=torch.float64, device=logits.device)
    if logits.dtype == torch.float16:
        batch, unit = with_unit_weights(batch, spec)
    out_OIW = None if gradient is None else checked_layout(gradient, inplace=True)
    loss, logprobs_N, entropy_N, metrics = passes.policy_loss(
        checked_layout(logits), batch, spec, scaling, vocab, backend, out_OIW
    )
    logprobs, entropy = logprobs_N.view(token_ids.shape), entropy_N.view(token_ids.shape)
    if logits.dtype == torch.float16:
        loss = (loss * unit).to(loss.dtype)
    return loss, logprobs, entropy, metrics, unit


@policy_loss.register_fake
def _(gradient: Tensor | None, logits: Tensor, token_ids: Tensor, *rest: object) -> FiveTensors:
    return *fake_loss(logits, token_ids), logits.new_empty((), dtype=torch.float64)


def fake_loss(features: Tensor, token_ids: Tensor) -> FourTensors:
    """Loss, log-probs, entropy and metrics without values."""
    dtype = compute_dtype(features)
    return (
        features.new_empty((), dtype=dtype),
        features.new_empty(token_ids.shape, dtype=dtype),
        features.new_empty(token_ids.shape, dtype=dtype),
        features.new_empty(len(METRIC_NAMES), dtype=torch.float32),
    )


@torch.library.custom_op("onepass_rl::scale_", mutates_args=("gradient",))
def scale_(gradient: Tensor, factor: Tensor, backend: str) -> None:
    """Multiplies a gradient by a 0-d factor."""
    backend = select_backend(backend, gradient.device, gradient.dtype)
    if gradient.dim() < 2:
        gradient = gradient[None]
    if gradient.numel() > 0:
        load_backend(backend).scale_(checked_layout(gradient, inplace=True), factor)


@torch.library.custom_op("onepass_rl::group_advantages", mutates_args=())
def group_advantages(
    rewards: Tensor,
    group_size: int | None,
    group_ids: Tensor | None,
    scale: str,
    ddof: int,
    eps: float,
) -> Tensor:
    """See `ops.group_advantages`."""
    if rewards.dim() != 1:
        raise ValueError(f"rewards: expected shape [S], got {list(rewards.shape)}")
    if (group_size is None) == (group_ids is None):
        raise ValueError("group_size, group_ids: expected exactly one of them")
    check_choice("scale", scale, ("group", "batch", "none"))
    if ddof not in (0, 1):
        raise ValueError(f"ddof: expected 0 or 1, got {ddof!r}")
    order = torch.arange(len(rewards), device=rewards.device)
    if group_ids is not None:
        if group_ids.shape != rewards.shape:
            raise ValueError(
                f"group_ids: expected shape {list(rewards.shape)}, got {list(group_ids.shape)}"
            )
        _, group_S, count_P = group_ids.unique(return_inverse=True, return_counts=True)
        order = group_S.argsort(stable=True)
        offsets = torch.nn.functional.pad(count_P.cumsum(0), (1, 0))
    else:
        assert group_size is not None
        check_group_size(group_size, len(rewards))
        offsets = advantages.group_offsets(len(rewards), group_size, rewards.device)
    advantages_S = advantages.normalized_advantages(
        rewards[order], offsets, scale=scale, ddof=ddof, eps=eps
    )
    in_order_S = torch.empty_like(advantages_S).index_copy_(0, order, advantages_S)
    return in_order_S.to(_advantage_dtype(rewards))


@group_advantages.register_fake
def _(rewards: Tensor, *rest: object) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=_advantage_dtype(rewards))


def _advantage_dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32
