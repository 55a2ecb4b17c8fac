"""The head from hidden states: logits exist for one chunk of tokens at a time.

The policy loss takes three matrix products in all, because its gradient is computed in forward
while a chunk's logits are at hand. Logits stay in float32 between the first product and the loss;
the weight gradient is accumulated in float32 over the chunks. Rows whose gradient is exactly zero
leave the other two products.

Shapes: N packed tokens, D model width, W this rank's rows of the LM-head weight. Legend:
`reference.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference, token_loss
from kernels.backends import load_backend
from kernels.passes import finish_stats
from kernels.sharding import VocabShard, merge_row_stats
from kernels.spec import LossSpec
from kernels.token_loss import TokenBatch

# Bytes of one chunk of float32 logits. On a GPU some 4096 tokens are wanted, so that reading and
# writing the float32 weight gradient hides behind the products (calculated, not measured).
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 2560 << 20}


def refuse_double_backward(name: str) -> None:
    """Backward runs with gradients enabled only under create_graph=True; a trace is no run."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name}: its gradient is not differentiable a second time; expected a backward "
            "without create_graph=True"
        )


def without_autocast(device: torch.device) -> torch.autocast:
    """Autocast would round the logits, and mix dtypes in backward."""
    return torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, slots=True)
class Head:
    """An LM head and how its logits become log-probs."""

    weight_WD: Tensor
    bias_W: Tensor | None
    inv_temperature: Tensor | float
    softcap: float
    vocab: VocabShard | None
    backend: str

    @property
    def width(self) -> int:
        """Columns of the vocabulary that are read."""
        return len(self.weight_WD) if self.vocab is None else self.vocab.width

    def inv_temperature_of(self, tokens: slice) -> Tensor | float:
        """Inverse temperature of some of the tokens."""
        if isinstance(self.inv_temperature, Tensor):
            return self.inv_temperature[tokens]
        return self.inv_temperature

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [n, W] in float32 (float64 for float64 hidden states), never rounded below."""
        weight_WD = self.weight_WD[: self.width]
        dtype = reference.compute_dtype(hidden_ND)
        with without_autocast(hidden_ND.device):
            if hidden_ND.is_cuda and hidden_ND.dtype in (torch.bfloat16, torch.float16):
                logits_NW = torch.mm(hidden_ND, weight_WD.t(), out_dtype=dtype)
            else:
                logits_NW = hidden_ND.to(dtype) @ weight_WD.to(dtype).t()
        if self.bias_W is not None:
            logits_NW += self.bias_W[: self.width]
        return logits_NW


class Gradients:
    """Gradients of the head and its input, accumulated in the compute dtype over chunks."""

    def __init__(self, head: Head, hidden_ND: Tensor, wanted: tuple[bool, bool, bool]) -> None:
        dtype = reference.compute_dtype(hidden_ND)
        wants_hidden, wants_weight, wants_bias = wanted
        self.head = head
        self.hidden_ND = torch.zeros_like(hidden_ND, dtype=dtype) if wants_hidden else None
        self.weight_WD = torch.zeros_like(head.weight_WD, dtype=dtype) if wants_weight else None
        self.bias_W = None
        if wants_bias and head.bias_W is not None:
            self.bias_W = torch.zeros_like(head.bias_W, dtype=dtype)

    def add(self, grad_logits_NW: Tensor, hidden_ND: Tensor, rows: slice | Tensor) -> None:
        """Adds the part of tokens `rows`, whose hidden states and logit gradients are given."""
        with without_autocast(hidden_ND.device):
            self._add(grad_logits_NW, hidden_ND, rows)

    def _add(self, grad_logits_NW: Tensor, hidden_ND: Tensor, rows: slice | Tensor) -> None:
        width = self.head.width
        if self.bias_W is not None:
            self.bias_W[:width] += grad_logits_NW.sum(dim=0)
        dtype = self.head.weight_WD.dtype if grad_logits_NW.is_cuda else grad_logits_NW.dtype
        grad_logits_NW = grad_logits_NW.to(dtype)
        if self.hidden_ND is not None:
            weight_WD = self.head.weight_WD[:width].to(dtype)
            self.hidden_ND[rows] = (grad_logits_NW @ weight_WD).to(self.hidden_ND.dtype)
        if self.weight_WD is not None:
            product_WD = self.weight_WD[:width]
            if grad_logits_NW.dtype == product_WD.dtype:
                product_WD.addmm_(grad_logits_NW.t(), hidden_ND.to(dtype))
            else:
                product_WD += torch.mm(
                    grad_logits_NW.t(), hidden_ND.to(dtype), out_dtype=product_WD.dtype
                )

    def reduce_hidden(self) -> None:
        """Sums the parts of the hidden gradient that the vocabulary shards hold."""
        if self.hidden_ND is not None and self.head.vocab is not None:
            dist.all_reduce(self.hidden_ND, group=self.head.vocab.group)


def chunks(
    num_tokens: int, chunk_tokens: int, offsets: Tensor, *, whole_sequences: bool
) -> Iterator[tuple[slice, slice | None]]:
    """Token ranges of at most `chunk_tokens`, with the sequences they hold if those stay whole.

    A single sequence longer than that is a chunk of its own.
    """
    if not whole_sequences:
        for start in range(0, num_tokens, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, num_tokens)), None
        return
    bounds = offsets.tolist()
    first = 0
    for last in range(1, len(bounds)):
        at_end = last == len(bounds) - 1
        if at_end or bounds[last + 1] - bounds[first] > chunk_tokens:
            yield slice(bounds[first], bounds[last]), slice(first, last)
            first = last


def default_chunk_tokens(head: Head) -> int:
    """Tokens whose float32 logits fit the byte budget of the device."""
    budget = CHUNK_BYTES.get(head.weight_WD.device.type, CHUNK_BYTES["cuda"])
    return max(1, budget // (4 * head.width))


def chunk_statistics(
    head: Head, logits_NW: Tensor, token_ids_N: Tensor, tokens: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log-prob, entropy, row maximum and log-sum of a chunk, merged over vocabulary shards."""
    stats_4N = load_backend(head.backend).row_stats(
        logits_NW[None], token_ids_N, head.inv_temperature_of(tokens), head.softcap
    )
    return finish_stats(merge_row_stats(stats_4N, token_ids_N, head.vocab))


def add_gradients(
    head: Head,
    gradients: Gradients,
    hidden_ND: Tensor,
    logits_NW: Tensor,
    token_ids_N: Tensor,
    tokens: slice,
    statistics: tuple[Tensor, Tensor, Tensor],
    coefficients: tuple[Tensor, Tensor],
) -> None:
    """Turns the logits of a chunk into their gradient, in place, and multiplies it out.

    `statistics` are row maximum, log-sum and entropy; `coefficients` the derivatives of the loss by
    log-prob and entropy, each [n].
    """
    per_row = [*statistics, *(c.to(logits_NW.dtype) for c in coefficients)]
    inv_temperature = head.inv_temperature_of(tokens)
    kept_N = (per_row[3] != 0) | (per_row[4] != 0)
    rows: slice | Tensor = tokens
    hidden_ND = hidden_ND[tokens]
    if not bool(kept_N.all()):
        index_N = kept_N.nonzero()[:, 0]
        rows = index_N + tokens.start
        hidden_ND, logits_NW = hidden_ND[index_N], logits_NW[index_N]
        token_ids_N = token_ids_N[index_N]
        per_row = [values_N[index_N] for values_N in per_row]
        if isinstance(inv_temperature, Tensor):
            inv_temperature = inv_temperature[index_N]
    load_backend(head.backend).grad_logits(
        logits_NW[None], token_ids_N, inv_temperature, head.softcap, *per_row, logits_NW[None]
    )
    gradients.add(logits_NW, hidden_ND, rows)


class LinearPolicyLossFunction(torch.autograd.Function):
    """`policy_loss` of hidden @ weight.T + bias, gradients computed in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        head: Head,
        batch: TokenBatch,
        spec: LossSpec,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        hidden_ND = hidden_ND.detach()
        gradients = Gradients(head, hidden_ND, wanted)
        terms = token_loss.token_terms(batch, spec)
        independent = token_loss.tokens_are_independent(
            spec, on_policy=batch.old_logprobs_N is None
        )
        dtype = reference.compute_dtype(hidden_ND)
        num_tokens = len(hidden_ND)
        # Log-prob, entropy and the two coefficients of every token, for the metrics.
        rows_4N = hidden_ND.new_zeros(4, num_tokens, dtype=torch.float64)
        loss = hidden_ND.new_zeros((), dtype=torch.float64)
        for tokens, sequences in chunks(
            num_tokens, chunk_tokens, batch.offsets, whole_sequences=not independent
        ):
            ids_N = batch.token_ids_N[tokens]
            logits_NW = head.logits(hidden_ND[tokens])
            logprobs_N, entropy_N, max_N, log_sum_N = chunk_statistics(
                head, logits_NW, ids_N, tokens
            )
            part = token_loss.slice_terms(terms, tokens.start, tokens.stop, sequences)
            part_loss, *coefficients = token_loss.loss_and_derivatives(
                logprobs_N, entropy_N, part, spec
            )
            loss += part_loss
            rows_4N[:, tokens] = torch.stack([logprobs_N, entropy_N, *coefficients])
            if any(wanted):
                add_gradients(
                    head,
                    gradients,
                    hidden_ND,
                    logits_NW,
                    ids_N,
                    tokens,
                    (max_N, log_sum_N, entropy_N),
                    (coefficients[0], coefficients[1]),
                )
        gradients.reduce_hidden()
        logprobs_N, entropy_N, coef_logprob_N, coef_entropy_N = rows_4N.unbind()
        metrics = token_loss.loss_metrics(
            logprobs_N, entropy_N, coef_logprob_N, coef_entropy_N, batch, terms, spec
        )
        ctx.gradients = [
            None if grad is None else grad.to(hidden_ND.dtype)
            for grad in (gradients.hidden_ND, gradients.weight_WD, gradients.bias_W)
        ]
        ctx.backend = head.backend
        outputs = loss.to(dtype), logprobs_N.to(dtype), entropy_N.to(dtype), metrics
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_policy_loss")
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_policy_loss: a second backward through the same loss; its gradient is "
                "computed once, in forward, and was handed out. Call linear_policy_loss again"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for grad in gradients:
            if grad is not None:
                grad.mul_(grads[0].to(grad.dtype))
        return *gradients, None, None, None, None


class LinearTokenLogprobsFunction(torch.autograd.Function):
    """`token_logprobs` of hidden @ weight.T + bias; backward recomputes the logits by chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        head: Head,
        token_ids_N: Tensor,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, dtype = len(hidden_ND), reference.compute_dtype(hidden_ND)
        rows_4N = hidden_ND.new_zeros(4, num_tokens, dtype=dtype)
        for start in range(0, num_tokens, chunk_tokens):
            tokens = slice(start, min(start + chunk_tokens, num_tokens))
            logits_NW = head.logits(hidden_ND.detach()[tokens])
            rows_4N[:, tokens] = torch.stack(
                chunk_statistics(head, logits_NW, token_ids_N[tokens], tokens)
            )
        logprobs_N, entropy_N, max_N, log_sum_N = rows_4N.unbind()
        lse_N = max_N + log_sum_N
        ctx.save_for_backward(hidden_ND, weight_WD, bias_W, token_ids_N, rows_4N)
        ctx.head, ctx.chunk_tokens = head, chunk_tokens
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse_N)
        return logprobs_N.clone(), entropy_N.clone(), lse_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_token_logprobs")
        # Unpacking the saved tensors is what detects a weight changed since forward.
        hidden_ND, _, _, token_ids_N, rows_4N = ctx.saved_tensors
        hidden_ND = hidden_ND.detach()
        head: Head = ctx.head
        gradients = Gradients(head, hidden_ND, ctx.needs_input_grad[:3])
        zero_N = torch.zeros_like(rows_4N[0])
        coefficients_2N = [zero_N if grad is None else grad for grad in grads[:2]]
        for start in range(0, len(hidden_ND), ctx.chunk_tokens):
            tokens = slice(start, min(start + ctx.chunk_tokens, len(hidden_ND)))
            _, entropy_N, max_N, log_sum_N = rows_4N[:, tokens].unbind()
            add_gradients(
                head,
                gradients,
                hidden_ND,
                head.logits(hidden_ND[tokens]),
                token_ids_N[tokens],
                tokens,
                (max_N, log_sum_N, entropy_N),
                (coefficients_2N[0][tokens], coefficients_2N[1][tokens]),
            )
        gradients.reduce_hidden()
        return gradients.hidden_ND, gradients.weight_WD, gradients.bias_W, None, None, None
