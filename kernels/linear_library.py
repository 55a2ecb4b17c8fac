"""The ops on hidden states as `torch.library` custom ops; see `library.py`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import linear
from kernels.arguments import HEAD, LOSS, ROWS, HeadArguments, LossArguments, RowArguments
from kernels.checks import checked_batch, checked_head, checked_rows, flat, like_tokens
from kernels.library import (
    FOUR_TENSORS,
    NUM_ROW_ARGUMENTS,
    FourTensors,
    fake_logprobs,
    fake_loss,
)
from kernels.linear_head import default_chunk_tokens, unscaled_dtype, without_autocast
from kernels.sharding import localize

ThreeTensors = tuple[Tensor, Tensor, Tensor]
SevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
THREE_TENSORS, SEVEN_TENSORS = (f"({', '.join(['Tensor'] * count)})" for count in (3, 7))
NUM_HEAD_ARGUMENTS = len(HeadArguments._fields)
NUM_CALL_ARGUMENTS = NUM_HEAD_ARGUMENTS + NUM_ROW_ARGUMENTS


@torch.library.custom_op(
    "onepass_rl::linear_token_logprobs",
    mutates_args=(),
    schema=f"({HEAD}, {ROWS}) -> {FOUR_TENSORS}",
)
def linear_token_logprobs(*arguments: Any) -> FourTensors:
    """`token_logprobs` of hidden @ weight.T + bias."""
    call = LinearCall(arguments)
    with without_autocast(call.hidden.device):
        rows = linear.token_logprobs_rows(
            call.inputs, call.settings, call.token_ids_N, call.chunk_tokens
        )
    logprobs, entropy, row_max, log_sum = (like_tokens(value_N, call.rows) for value_N in rows)
    return logprobs, entropy, row_max, log_sum


@linear_token_logprobs.register_fake
def _(*arguments: Any) -> FourTensors:
    return fake_logprobs(arguments[0], arguments[NUM_HEAD_ARGUMENTS])


@torch.library.custom_op(
    "onepass_rl::linear_token_logprobs_gradients",
    mutates_args=(),
    schema=f"({HEAD}, {ROWS}, Tensor[] values, Tensor grad_logprobs, Tensor grad_entropy, "
    f"bool[] wanted) -> {THREE_TENSORS}",
)
def linear_token_logprobs_gradients(*arguments: Any) -> ThreeTensors:
    """Gradients by hidden states, weight and bias; empty where not wanted."""
    call = LinearCall(arguments)
    values, grad_logprobs, grad_entropy, wanted = arguments[NUM_CALL_ARGUMENTS:]
    with without_autocast(call.hidden.device):
        gradients = linear.token_logprobs_gradients(
            call.inputs,
            call.settings,
            call.token_ids_N,
            call.chunk_tokens,
            [flat(value) for value in values],
            (flat(grad_logprobs), flat(grad_entropy)),
            tuple(wanted),
        )
    return given_gradients(call.hidden, gradients)


@linear_token_logprobs_gradients.register_fake
def _(*arguments: Any) -> ThreeTensors:
    return fake_gradients(arguments[:3], arguments[-1])


@torch.library.custom_op(
    "onepass_rl::linear_policy_loss",
    mutates_args=(),
    schema=f"({HEAD}, {ROWS}, {LOSS}, bool[] wanted) -> {SEVEN_TENSORS}",
)
def linear_policy_loss(*arguments: Any) -> SevenTensors:
    """`policy_loss` of hidden @ weight.T + bias, and the gradients by the three, those of float16
    in float32 (see `policy_loss`)."""
    *loss_arguments, wanted = arguments[NUM_CALL_ARGUMENTS:]
    loss_call = LossArguments(*loss_arguments)
    call = LinearCall(arguments, loss_call.mask)
    spec = loss_call.spec
    batch = checked_batch(call.rows, spec, call.settings.vocab, loss_call)
    with without_autocast(call.hidden.device):
        gradients, (loss, logprobs_N, entropy_N, metrics) = linear.policy_loss_and_gradients(
            call.inputs,
            call.settings,
            batch,
            spec,
            call.chunk_tokens,
            tuple(wanted),
            call.rows.row_tokens,
        )
    logprobs, entropy = like_tokens(logprobs_N, call.rows), like_tokens(entropy_N, call.rows)
    return loss, logprobs, entropy, metrics, *given_gradients(call.hidden, gradients)


@linear_policy_loss.register_fake
def _(*arguments: Any) -> SevenTensors:
    return (
        *fake_loss(arguments[0], arguments[NUM_HEAD_ARGUMENTS]),
        *fake_gradients(arguments[:3], arguments[-1]),
    )


class LinearCall:
    """The arguments that the ops on hidden states share, checked and in canonical form."""

    def __init__(self, arguments: Sequence[Any], mask: Tensor | None = None) -> None:
        """Of the arguments of an op, the first ones are read: HEAD and ROWS."""
        head = HeadArguments(*arguments[:NUM_HEAD_ARGUMENTS])
        rows = RowArguments(*arguments[NUM_HEAD_ARGUMENTS:NUM_CALL_ARGUMENTS])
        hidden, weight, vocab = head.hidden, head.weight, rows.vocab
        self.hidden = hidden
        self.settings = checked_head(head, rows, vocab)
        self.rows = checked_rows(
            hidden, rows.token_ids, mask, None, len(weight) if vocab is None else None
        )
        self.token_ids_N = localize(self.rows.token_ids_N, vocab)
        self.inputs = hidden.reshape(-1, hidden.shape[-1]), weight, head.bias
        num_tokens = len(self.token_ids_N)
        self.chunk_tokens = head.chunk_tokens or default_chunk_tokens(
            num_tokens, weight, self.settings
        )


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
