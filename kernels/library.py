"""The ops as `torch.library` custom ops: opaque to tracing, with fakes that know their shapes.

Those on hidden states are in `linear_library.py`. An op takes the caller's tensors and checks every
argument when it runs; `autograd` makes it differentiable. A gradient is written into memory that
the caller gives, which may be the logits themselves. Shape legend: `ops.py`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter

from kernels import advantages, passes
from kernels.arguments import LOSS, ROWS, LossArguments, RowArguments
from kernels.backends import load_backend, select_backend
from kernels.checks import (
    check_group_size,
    checked_batch,
    checked_layout,
    checked_rows,
    checked_scaling,
    flat,
    known_width,
    like_tokens,
)
from kernels.loss_metrics import METRIC_NAMES
from kernels.passes import RowValues
from kernels.reference import compute_dtype
from kernels.sharding import localize
from kernels.spec import check_choice
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
FOUR_TENSORS, FIVE_TENSORS = (f"({', '.join(['Tensor'] * count)})" for count in (4, 5))
NUM_ROW_ARGUMENTS = len(RowArguments._fields)


@torch.library.custom_op(
    "onepass_rl::token_logprobs",
    mutates_args=(),
    schema=f"(Tensor logits, {ROWS}) -> {FOUR_TENSORS}",
)
def token_logprobs(logits: Tensor, *arguments: Any) -> FourTensors:
    """Log-prob, entropy, row maximum and log of the sum of exp(z - maximum), like `token_ids`."""
    call = RowArguments(*arguments)
    backend, vocab = select_backend(call.backend, logits.device, logits.dtype), call.vocab
    rows = checked_rows(logits, call.token_ids, None, vocab, known_width(logits, vocab))
    scaling = checked_scaling(call.temperature, call.token_ids, call.softcap)
    values = passes.row_values(
        checked_layout(logits), localize(rows.token_ids_N, vocab), scaling, vocab, backend
    )
    logprobs, entropy, row_max, log_sum = (like_tokens(value_N, rows) for value_N in values)
    return logprobs, entropy, row_max, log_sum


@token_logprobs.register_fake
def _(logits: Tensor, token_ids: Tensor, *rest: object) -> FourTensors:
    return fake_logprobs(logits, token_ids)


def fake_logprobs(features: Tensor, token_ids: Tensor) -> FourTensors:
    """The results of `token_logprobs` without values."""
    dtype = compute_dtype(features)
    one, two, three, four = (features.new_empty(token_ids.shape, dtype=dtype) for _ in range(4))
    return one, two, three, four


@torch.library.custom_op(
    "onepass_rl::token_logprobs_gradient",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!) gradient, Tensor logits, {ROWS}, Tensor[] values, Tensor grad_logprobs, "
    "Tensor grad_entropy) -> ()",
)
def token_logprobs_gradient(gradient: Tensor, logits: Tensor, *arguments: Any) -> None:
    """Writes the gradient of the logits; `values` are the results of `token_logprobs`."""
    call = RowArguments(*arguments[:NUM_ROW_ARGUMENTS])
    values, grad_logprobs, grad_entropy = arguments[NUM_ROW_ARGUMENTS:]
    vocab = call.vocab
    passes.write_gradient(
        checked_layout(logits),
        localize(flat(call.token_ids).long(), vocab),
        checked_scaling(call.temperature, call.token_ids, call.softcap),
        RowValues(*(flat(value) for value in values)),
        (flat(grad_logprobs), flat(grad_entropy)),
        vocab,
        select_backend(call.backend, logits.device, logits.dtype),
        checked_layout(gradient, inplace=True),
    )


@torch.library.custom_op(
    "onepass_rl::policy_loss",
    mutates_args=("gradient",),
    schema=f"(Tensor(a!)? gradient, Tensor logits, {ROWS}, {LOSS}) -> {FIVE_TENSORS}",
)
def policy_loss(gradient: Tensor | None, logits: Tensor, *arguments: Any) -> FiveTensors:
    """Loss, log-probs, entropy, metrics and a unit; writes the gradient of the logits if wanted.

    For float16, which would round small gradients away before a loss scaler can make them larger,
    the gradient is the one written times the unit. For other dtypes the unit is empty.
    """
    call = RowArguments(*arguments[:NUM_ROW_ARGUMENTS])
    loss_call = LossArguments(*arguments[NUM_ROW_ARGUMENTS:])
    backend, vocab = select_backend(call.backend, logits.device, logits.dtype), call.vocab
    rows = checked_rows(logits, call.token_ids, loss_call.mask, vocab, known_width(logits, vocab))
    scaling = checked_scaling(call.temperature, call.token_ids, call.softcap)
    spec = loss_call.spec
    batch = checked_batch(rows, spec, vocab, loss_call)
    unit = logits.new_empty(0, dtype=torch.float64)
    if logits.dtype == torch.float16:
        batch, unit = with_unit_weights(batch, spec)
    out_OIW = None if gradient is None else checked_layout(gradient, inplace=True)
    loss, logprobs_N, entropy_N, metrics = passes.policy_loss(
        checked_layout(logits), batch, spec, scaling, vocab, backend, out_OIW
    )
    if logits.dtype == torch.float16:
        loss = (loss * unit).to(loss.dtype)
    return loss, like_tokens(logprobs_N, rows), like_tokens(entropy_N, rows), metrics, unit


@policy_loss.register_fake
def _(gradient: Tensor | None, logits: Tensor, token_ids: Tensor, *rest: object) -> FiveTensors:
    unit_shape = () if logits.dtype == torch.float16 else (0,)
    unit = logits.new_empty(unit_shape, dtype=torch.float64)
    return *fake_loss(logits, token_ids), unit


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
    if factor.device.type == "cpu" and factor.item() == 1:
        return
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
