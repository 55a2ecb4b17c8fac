"""The ops as `torch.library` custom ops: opaque to tracing, with fakes that know their shapes.

An op takes the caller's tensors and checks every argument when it runs; `autograd` makes it
differentiable. A gradient is written into memory that the caller gives, which may be the logits
themselves. Numbers that change from step to step (temperature, clip bounds, denominator) come as
tensors on the CPU, so that torch.compile does not compile anew for each value. Shape legend:
`ops.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn import Parameter

from kernels import advantages, linear, passes
from kernels.backends import load_backend, select_backend
from kernels.checks import (
    check_group_size,
    checked_batch,
    checked_head,
    checked_layout,
    checked_rows,
    checked_scaling,
)
from kernels.linear_head import default_chunk_tokens, unscaled_dtype, without_autocast
from kernels.passes import RowValues
from kernels.reference import compute_dtype
from kernels.sharding import VocabShard, localize
from kernels.spec import LossSpec, check_choice
from kernels.token_loss import METRIC_NAMES, with_unit_weights


def run(op: CustomOpDef, *arguments: Any) -> Any:
    """Calls the body of an op, or the op itself where tracing or fake tensors need it.

    The body alone is faster by what a custom op adds to each call (measured: 0.1 to 0.3 ms).
    """
    if torch.compiler.is_compiling():
        return op(*arguments)
    for argument in arguments:
        if isinstance(argument, Tensor) and type(argument) not in PLAIN_TENSORS:
            return op(*arguments)
    return op._init_fn(*arguments)


PLAIN_TENSORS = (Tensor, Parameter)
ThreeTensors = tuple[Tensor, Tensor, Tensor]
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


@torch.library.custom_op("onepass_rl::linear_token_logprobs", mutates_args=())
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    product_dtype: torch.dtype,
    chunk_tokens: int | None,
    temperature: Tensor,
    softcap: float,
    shard: list[int],
    shard_group: str,
    backend: str,
) -> FourTensors:
    """`token_logprobs` of hidden @ weight.T + bias."""
    call = LinearCall(
        hidden,
        weight,
        bias,
        token_ids,
        None,
        product_dtype,
        chunk_tokens,
        temperature,
        softcap,
        shard,
        shard_group,
        backend,
    )
    with without_autocast(hidden.device):
        rows = linear.token_logprobs_rows(
            call.inputs, call.settings, call.token_ids_N, call.chunk_tokens
        )
    logprobs, entropy, row_max, log_sum = (values_N.view(token_ids.shape) for values_N in rows)
    return logprobs, entropy, row_max, log_sum


@linear_token_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *rest: object
) -> FourTensors:
    dtype = compute_dtype(hidden)
    one, two, three, four = (hidden.new_empty(token_ids.shape, dtype=dtype) for _ in range(4))
    return one, two, three, four


@torch.library.custom_op("onepass_rl::linear_token_logprobs_gradients", mutates_args=())
def linear_token_logprobs_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    product_dtype: torch.dtype,
    chunk_tokens: int | None,
    temperature: Tensor,
    softcap: float,
    shard: list[int],
    shard_group: str,
    backend: str,
    values: list[Tensor],
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    wanted: list[bool],
) -> ThreeTensors:
    """Gradients by hidden states, weight and bias; empty where not wanted."""
    call = LinearCall(
        hidden,
        weight,
        bias,
        token_ids,
        None,
        product_dtype,
        chunk_tokens,
        temperature,
        softcap,
        shard,
        shard_group,
        backend,
    )
    with without_autocast(hidden.device):
        gradients = linear.token_logprobs_gradients(
            call.inputs,
            call.settings,
            call.token_ids_N,
            call.chunk_tokens,
            [value.reshape(-1) for value in values],
            (grad_logprobs.reshape(-1), grad_entropy.reshape(-1)),
            tuple(wanted),
        )
    return given_gradients(hidden, gradients)


@linear_token_logprobs_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: object) -> ThreeTensors:
    return fake_gradients((hidden, weight, bias), rest[-1])


@torch.library.custom_op("onepass_rl::linear_policy_loss", mutates_args=())
def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product_dtype: torch.dtype,
    chunk_tokens: int | None,
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
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`policy_loss` of hidden @ weight.T + bias, and the gradients by the three, those of float16
    in float32 (see `policy_loss`)."""
    call = LinearCall(
        hidden,
        weight,
        bias,
        token_ids,
        mask,
        product_dtype,
        chunk_tokens,
        temperature,
        softcap,
        shard,
        shard_group,
        backend,
    )
    spec = LossSpec.from_parts(spec_choices, spec_numbers)
    batch = checked_batch(
        call.rows,
        spec,
        call.settings.vocab,
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
    with without_autocast(hidden.device):
        gradients, (loss, logprobs_N, entropy_N, metrics) = linear.policy_loss_and_gradients(
            call.inputs, call.settings, batch, spec, call.chunk_tokens, tuple(wanted)
        )
    logprobs, entropy = logprobs_N.view(token_ids.shape), entropy_N.view(token_ids.shape)
    return loss, logprobs, entropy, metrics, *given_gradients(hidden, gradients)


@linear_policy_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product_dtype: torch.dtype,
    chunk_tokens: int | None,
    token_ids: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *fake_loss(hidden, token_ids), *fake_gradients((hidden, weight, bias), rest[-1])


class LinearCall:
    """The arguments that the ops on hidden states share, checked and in canonical form."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        mask: Tensor | None,
        product_dtype: torch.dtype,
        chunk_tokens: int | None,
        temperature: Tensor,
        softcap: float,
        shard: list[int],
        shard_group: str,
        backend: str,
    ) -> None:
        vocab = VocabShard.from_parts(shard, shard_group)
        self.settings = checked_head(
            hidden,
            weight,
            bias,
            token_ids,
            temperature,
            softcap,
            vocab,
            backend,
            chunk_tokens,
            product_dtype,
        )
        self.rows = checked_rows(
            hidden, token_ids, mask, None, len(weight) if vocab is None else None
        )
        self.token_ids_N = localize(self.rows.token_ids_N, vocab)
        self.inputs = hidden.reshape(-1, hidden.shape[-1]), weight, bias
        num_tokens = len(self.token_ids_N)
        self.chunk_tokens = chunk_tokens or default_chunk_tokens(num_tokens, weight, self.settings)


def given_gradients(hidden: Tensor, gradients: list[Tensor | None]) -> ThreeTensors:
    """Gradients by hidden states, weight and bias, shaped like them; empty for None."""
    of_hidden, of_weight, of_bias = (
        hidden.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    if gradients[0] is not None:
        of_hidden = of_hidden.view(hidden.shape)
    return of_hidden, of_weight, of_bias


def fake_gradients(inputs: tuple[Tensor, Tensor, Tensor | None], wanted: object) -> ThreeTensors:
    """Gradients without values; empty where not wanted."""
    assert isinstance(wanted, Sequence)
    of_hidden, of_weight, of_bias = (
        inputs[0].new_empty(0)
        if tensor is None or not want
        else tensor.new_empty(tensor.shape, dtype=unscaled_dtype(tensor.dtype))
        for tensor, want in zip(inputs, wanted, strict=True)
    )
    return of_hidden, of_weight, of_bias


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
