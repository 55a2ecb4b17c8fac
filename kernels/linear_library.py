"""The ops on hidden states as `torch.library` custom ops; see `library.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import linear
from kernels.checks import checked_batch, checked_head, checked_rows
from kernels.library import FourTensors, fake_loss
from kernels.linear_head import default_chunk_tokens, unscaled_dtype, without_autocast
from kernels.reference import compute_dtype
from kernels.sharding import VocabShard, localize
from kernels.spec import LossSpec

ThreeTensors = tuple[Tensor, Tensor, Tensor]


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
            call.inputs,
            call.settings,
            batch,
            spec,
            call.chunk_tokens,
            tuple(wanted),
            token_ids.shape[1] if token_ids.dim() == 2 else None,
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
