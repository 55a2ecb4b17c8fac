"""The parity gate: a step's own loss, log-probabilities and gradient against float64.

A `HeadCheck` follows one call of `kernels.linear_policy_loss` and its backward, and recomputes from
the same hidden states and head weight, in plain PyTorch and float64:
- log-probability and entropy of WINDOW_TOKENS tokens drawn from the whole micro-batch,
- the loss and its derivatives from the log-probabilities and entropies of all its tokens (so that
  a ratio next to its clip falls on the same side, and sequences are whole),
- from those derivatives the gradient by the hidden states of the drawn tokens, and the gradient by
  some rows of the weight, of all tokens: up to SAMPLED_ROWS rows of target tokens, and as many
  spread evenly over the vocabulary (nothing of a weight that is frozen).

How far off each may be stands in `exact_head.py`. NaN is a breach.

Shapes: N packed tokens, n drawn ones, W this rank's rows of the weight, R checked rows, D width.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import LossSpec, VocabShard
from kernels.advantages import segment_index
from kernels.token_loss import TokenBatch, loss_and_derivatives, token_terms
from trainer.config import UsageError
from trainer.exact_head import FACTOR, ROUNDOFF, Exact, ExactHead, Tokens, roundoff
from trainer.fsdp import World, gather_in_order
from trainer.packing import IGNORED_TOKEN

WINDOW_TOKENS = 32
SAMPLED_ROWS = 64
LOGPROBS, ENTROPY, LOSS = "log-probabilities", "the entropy", "the loss"
HIDDEN_GRADIENT = "the gradient by the hidden states"
WEIGHT_GRADIENT = "the gradient by the LM head's weight"
# Names of the metrics.
NAMES = {
    LOGPROBS: "logprobs",
    ENTROPY: "entropy",
    LOSS: "loss",
    HIDDEN_GRADIENT: "hidden_gradient",
    WEIGHT_GRADIENT: "weight_gradient",
}


class ParityError(UsageError):
    """The kernels and float64 differ by more than rounding; the run stops before the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The worst token or row of one tensor."""

    tensor: str
    error: float
    bound: float

    @property
    def share(self) -> float:
        """The error as a share of its bound, infinite for NaN."""
        if self.error == 0:
            return 0.0
        share = self.error / self.bound if self.bound else math.inf
        return math.inf if math.isnan(share) else share


class HeadCheck:
    """Stands in for `kernels.linear_policy_loss` in one forward and backward, and checks both.

    Args:
        spec: of the loss.
        vocab: this rank's rows of the vocabulary, None for all.
        world: ranks that check at the same time, each its own tokens (or rows).
        seed: what is drawn derives from it; with a sharded vocabulary the same on all ranks.
    """

    def __init__(self, spec: LossSpec, vocab: VocabShard | None, world: World, seed: int) -> None:
        self.spec, self.vocab, self.world = spec, vocab, world
        self.random = random.Random(seed)
        self.comparisons: list[Comparison] = []
        self.checkable = False
        # What the hooks took from the gradients.
        self.hidden_grad_nD, self.weight_grad_RD = torch.empty(0), torch.empty(0)

    def __call__(
        self,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        token_ids_N: Tensor,
        old_logprobs_N: Tensor | None,
        **options: Any,
    ) -> kernels.PolicyLoss:
        """The result of `kernels.linear_policy_loss` for the same arguments, bit for bit.

        Collectives: with a vocabulary shard, sums over it.
        """
        # Views, so that the hooks see the head's part of the gradient of a shared weight alone.
        hidden_ND, weight_WD = hidden_ND.view_as(hidden_ND), weight_WD.view_as(weight_WD)
        result = kernels.linear_policy_loss(
            hidden_ND,
            weight_WD,
            token_ids_N,
            old_logprobs_N,
            spec=self.spec,
            vocab=self.vocab,
            **options,
        )
        with torch.no_grad():
            self._recompute(hidden_ND, weight_WD, token_ids_N, old_logprobs_N, result, options)
        hidden_ND.register_hook(self._keep_hidden_grad)
        if weight_WD.requires_grad:
            weight_WD.register_hook(self._keep_weight_grad)
        return result

    def compare(self, step: int) -> dict[str, float]:
        """After the backward: the largest error of each tensor on any rank, as a share of its
        bound.

        Raises:
            ParityError: a share above 1, on every rank.

        Collectives: one all-gather of pickled objects.
        """
        if self.checkable:
            self._compare_gradients()
        by_tensor: dict[str, Comparison] = {}
        for each in gather_in_order(self.world, self.comparisons):
            worst = by_tensor.setdefault(each.tensor, each)
            if each.share > worst.share:
                by_tensor[each.tensor] = each
        for worst in by_tensor.values():
            if not worst.share <= 1:
                raise ParityError(
                    f"step {step}: expected {worst.tensor} within {worst.bound:.2g} of float64, "
                    f"got an error of {worst.error:.2g} before the update; try another --backend "
                    "(--parity-every 0 turns this check off)"
                )
        return {f"parity/{NAMES[each.tensor]}": each.share for each in by_tensor.values()}

    def _recompute(
        self,
        hidden_ND: Tensor,
        weight_WD: Tensor,
        token_ids_N: Tensor,
        old_logprobs_N: Tensor | None,
        result: kernels.PolicyLoss,
        options: dict[str, Any],
    ) -> None:
        """What float64 says, compared where it can be before the backward."""
        head = ExactHead(
            weight_WD, options["bias"], options["temperature"], options["softcap"], self.vocab
        )
        self.tokens_n = self._draw((token_ids_N != IGNORED_TOKEN).nonzero()[:, 0], WINDOW_TOKENS)
        self.rows_R = self._draw_rows(token_ids_N, head)
        batch = _batch(token_ids_N, old_logprobs_N, options)
        loss, coef_logprob_N, coef_entropy_N = loss_and_derivatives(
            result.logprobs, result.entropy, token_terms(batch, self.spec), self.spec
        )
        tokens = Tokens(
            hidden_ND=hidden_ND,
            ids_N=token_ids_N,
            logprobs_N=result.logprobs.double(),
            entropy_N=result.entropy.double(),
            coef_logprob_N=coef_logprob_N,
            coef_entropy_N=coef_entropy_N,
            operand_roundoff=roundoff(hidden_ND.dtype) if hidden_ND.is_cuda else 0.0,
        )
        window = head.window(tokens.at(self.tokens_n))
        self.hidden = window.hidden_grad
        self.rows = head.weight_rows(tokens, self.rows_R) if weight_WD.requires_grad else None
        # Where float64 finds no number either, the run ends for what is not finite in the model.
        self.checkable = bool(window.logprobs.exact.isfinite().all() | result.loss.isfinite())
        if not self.checkable:
            return
        roundings = (coef_logprob_N.abs() * (1 + tokens.logprobs_N.abs())).sum()
        roundings += (coef_entropy_N.abs() * (1 + tokens.entropy_N)).sum()
        self._compare(LOGPROBS, result.logprobs[self.tokens_n], window.logprobs)
        self._compare(ENTROPY, result.entropy[self.tokens_n], window.entropy)
        loss_bound = FACTOR * ROUNDOFF * (loss.abs() + roundings)
        self._compare(LOSS, result.loss[None], Exact(loss[None], loss_bound[None]))

    def _compare_gradients(self) -> None:
        self._compare(HIDDEN_GRADIENT, self.hidden_grad_nD, self.hidden)
        if self.rows is not None:
            self._compare(WEIGHT_GRADIENT, self.weight_grad_RD, self.rows)

    def _compare(self, tensor: str, computed: Tensor, exact: Exact) -> None:
        """Keeps the entry or row whose error is the largest share of its bound."""
        error = computed.detach().double() - exact.exact
        bound = exact.bound
        if error.dim() == 2:
            # A gradient is rounded to its dtype once more.
            bound = bound + roundoff(computed.dtype) * exact.exact.norm(dim=1)
            error = error.norm(dim=1)
        pairs = zip(error.abs().tolist(), bound.tolist(), strict=True)
        comparisons = [Comparison(tensor=tensor, error=e, bound=b) for e, b in pairs]
        nothing = Comparison(tensor=tensor, error=0.0, bound=0.0)
        self.comparisons.append(max(comparisons, key=lambda each: each.share, default=nothing))

    def _draw(self, choices_X: Tensor, most: int) -> Tensor:
        places = self.random.sample(range(len(choices_X)), min(most, len(choices_X)))
        return choices_X[torch.tensor(sorted(places), dtype=torch.long, device=choices_X.device)]

    def _draw_rows(self, token_ids_N: Tensor, head: ExactHead) -> Tensor:
        """Rows of target tokens, and rows spread evenly from a drawn start."""
        is_here_N, rows_N = head.place(token_ids_N)
        targets = self._draw(rows_N[is_here_N].unique(), SAMPLED_ROWS)
        count = len(head.weight_WD)
        spacing = max(1, count // SAMPLED_ROWS)
        spread = torch.arange(self.random.randrange(spacing), count, spacing, device=targets.device)
        return torch.cat([targets, spread]).unique()

    def _keep_hidden_grad(self, gradient_ND: Tensor) -> None:
        self.hidden_grad_nD = gradient_ND[self.tokens_n]

    def _keep_weight_grad(self, gradient_WD: Tensor) -> None:
        self.weight_grad_RD = gradient_WD[self.rows_R]


def _batch(
    token_ids_N: Tensor, old_logprobs_N: Tensor | None, options: dict[str, Any]
) -> TokenBatch:
    offsets = options["cu_seqlens"].long()
    return TokenBatch(
        token_ids_N=token_ids_N,
        offsets=offsets,
        old_logprobs_N=old_logprobs_N,
        ref_logprobs_N=options["ref_logprobs"],
        sampler_logprobs_N=options["sampler_logprobs"],
        advantages_N=options["advantages"][segment_index(offsets, len(token_ids_N))],
        denominator=options["denominator"],
    )
