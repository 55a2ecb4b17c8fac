"""An LM head in float64, what follows from its logits, and how far float32 may be off.

u is the unit roundoff of float32 (2^-24), in which the kernels keep logits and all sums, w_j the
norm of row j of the weight, h the norm of a token's hidden state, T the temperature, p the
probabilities, H the entropy, c and k the derivatives of the loss by log-probability and entropy.
Plain PyTorch in float32 was seen to err by up to 3.5 u h w_j in a logit (the embedded model; 1.5
for SmolLM2-135M), and F = FACTOR times u h w_j are allowed. What follows from that to first order
is allowed too, and F roundings of each result:

    log-probability  F u ((h / T) (w_y + sum_j p_j w_j) + 1 + |logprob|)
    entropy          F u ((h / T) sum_j p_j |log p_j + H| w_j + 1 + H)
    loss             F u (|loss| + sum_n |c_n| (1 + |logprob_n|) + |k_n| (1 + H_n))

The gradient by logit j has terms of the size m_j = |c| ([j = y] + p_j) + |k| p_j (1 + |log p_j| +
H), and F u m_j (1 + |log p_j| + (h / T) max w) are allowed; in the gradient by a hidden state the
sum of that over j, times w_j; in that by a row of the weight the sum over the tokens, times h.
Where a product takes operands of lower precision (on a GPU), their roundoff times the gradient by
the logits is added; and always the rounding to the dtype of the result. Errors of gradients are
Euclidean norms, of a token or of a row.

Shapes: N packed tokens, n some of them, W this rank's rows of the weight, R some of them, X rows of
either kind, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import one_hot

from kernels import VocabShard

FACTOR = 16
# Rows of the weight that are float64 at a time, and tokens whose share of some rows is.
BLOCK_ROWS, BLOCK_TOKENS = 4096, 1024
ROUNDOFF = torch.finfo(torch.float32).eps / 2
SMALLEST = torch.finfo(torch.float32).tiny


def roundoff(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True, slots=True)
class Exact:
    """Values in float64, and how far computed ones may be off: each, or the norm of each row."""

    exact: Tensor
    bound: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    logprobs: Exact
    entropy: Exact
    hidden_grad: Exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens, what the kernels found for them, and the derivatives of the loss by that."""

    hidden_ND: Tensor
    ids_N: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    coef_logprob_N: Tensor
    coef_entropy_N: Tensor
    operand_roundoff: float
    """Of the operands of products, where these are rounded to a lower precision."""

    def at(self, places_n: Tensor) -> "Tokens":
        return Tokens(
            hidden_ND=self.hidden_ND[places_n].double(),
            ids_N=self.ids_N[places_n],
            logprobs_N=self.logprobs_N[places_n],
            entropy_N=self.entropy_N[places_n],
            coef_logprob_N=self.coef_logprob_N[places_n],
            coef_entropy_N=self.coef_entropy_N[places_n],
            operand_roundoff=self.operand_roundoff,
        )


class ExactHead:
    """The LM head in float64, its rows converted a block at a time."""

    def __init__(
        self,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        temperature: float,
        softcap: float,
        vocab: VocabShard | None,
    ) -> None:
        self.weight_WD, self.bias_W, self.vocab = weight_WD, bias_W, vocab
        self.temperature, self.softcap = temperature, softcap
        self.norms_W = torch.linalg.vector_norm(weight_WD, dim=1, dtype=torch.float32).double()
        self.largest_norm = self._over_shards(self.norms_W.amax(), dist.ReduceOp.MAX)

    def place(self, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens' rows are here, and which rows they are (any, where they are not)."""
        rows_N = token_ids_N - (0 if self.vocab is None else self.vocab.start)
        is_here_N = (rows_N >= 0) & (rows_N < len(self.weight_WD))
        return is_here_N, torch.where(is_here_N, rows_N, 0)

    def window(self, tokens: Tokens) -> Window:
        """Log-probabilities, entropies and the gradient by the hidden states of a few tokens."""
        z_nW = torch.cat([tokens.hidden_ND @ block.T for _, block in self._blocks()], dim=1)
        z_nW = self._scaled(z_nW, slice(None))
        max_n1 = self._over_shards(z_nW.amax(1, keepdim=True), dist.ReduceOp.MAX)
        sum_n1 = self._over_shards((z_nW - max_n1).exp().sum(1, keepdim=True))
        # Far below what has a probability, but finite.
        logp_nW = (z_nW - max_n1 - sum_n1.log()).clamp(min=-1e4)
        is_here_n, rows_n = self.place(tokens.ids_N)
        target_nW = (one_hot(rows_n, z_nW.shape[1]) * is_here_n[:, None]).bool()
        logprobs_n = self._over_shards(torch.where(target_nW, logp_nW, 0.0).sum(1))
        p_nW = logp_nW.exp()
        entropy_n = self._over_shards(-(p_nW * logp_nW).sum(1))
        unit_n = ROUNDOFF * self._sizes(tokens)
        target_norm_n = self._over_shards(target_nW.double() @ self.norms_W)
        mean_norm_n = self._over_shards(p_nW @ self.norms_W)
        spread_n = self._over_shards((p_nW * (logp_nW + entropy_n[:, None]).abs()) @ self.norms_W)
        derivative_nW, size_nW = self._derivative(logp_nW, z_nW, target_nW, tokens)
        allowed_nW = self._allowed(derivative_nW, size_nW, logp_nW, tokens)
        gradient_nD = tokens.hidden_ND.new_zeros(tokens.hidden_ND.shape)
        for rows, block_bD in self._blocks():
            gradient_nD += derivative_nW[:, rows] @ block_bD
        return Window(
            logprobs=Exact(
                logprobs_n,
                FACTOR * (unit_n * (target_norm_n + mean_norm_n) + ROUNDOFF * (1 - logprobs_n)),
            ),
            entropy=Exact(entropy_n, FACTOR * (unit_n * spread_n + ROUNDOFF * (1 + entropy_n))),
            hidden_grad=Exact(
                self._over_shards(gradient_nD), self._over_shards(allowed_nW @ self.norms_W)
            ),
        )

    def weight_rows(self, tokens: Tokens, rows_R: Tensor) -> Exact:
        """The gradient by some rows of the weight."""
        weight_RD = self.weight_WD[rows_R].double()
        gradient_RD, bound_R = torch.zeros_like(weight_RD), weight_RD.new_zeros(len(rows_R))
        matters_N = (tokens.coef_logprob_N != 0) | (tokens.coef_entropy_N != 0)
        for places_n in matters_N.nonzero()[:, 0].split(BLOCK_TOKENS):
            part = tokens.at(places_n)
            is_here_n, rows_n = self.place(part.ids_N)
            z_nR = self._scaled(part.hidden_ND @ weight_RD.T, rows_R)
            target_n1 = (part.hidden_ND * self.weight_WD[rows_n].double()).sum(1, keepdim=True)
            target_n1 = self._scaled(target_n1, rows_n[:, None])
            target_n = self._over_shards(torch.where(is_here_n, target_n1[:, 0], 0.0))
            logp_nR = (z_nR - (target_n - part.logprobs_N)[:, None]).clamp(min=-1e4)
            is_target_nR = is_here_n[:, None] & (rows_n[:, None] == rows_R)
            derivative_nR, size_nR = self._derivative(logp_nR, z_nR, is_target_nR, part)
            allowed_nR = self._allowed(derivative_nR, size_nR, logp_nR, part)
            gradient_RD += derivative_nR.T @ part.hidden_ND
            bound_R += allowed_nR.T @ part.hidden_ND.norm(dim=1)
        return Exact(gradient_RD, bound_R)

    def _derivative(
        self, logp_nX: Tensor, z_nX: Tensor, is_target_nX: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        """Derivative of the loss by the product of hidden state and row, and the size m of the
        module's text."""
        c_n1, k_n1 = tokens.coef_logprob_N[:, None], tokens.coef_entropy_N[:, None]
        p_nX, entropy_n1 = logp_nX.exp(), tokens.entropy_N[:, None]
        derivative_nX = c_n1 * (is_target_nX.double() - p_nX) - k_n1 * p_nX * (logp_nX + entropy_n1)
        size_nX = c_n1.abs() * (is_target_nX.double() + p_nX)
        size_nX += k_n1.abs() * p_nX * (1 + entropy_n1 - logp_nX)
        slope: Tensor | float = 1 / self.temperature
        if self.softcap:
            slope = slope * (1 - (z_nX * self.temperature / self.softcap) ** 2)
        return derivative_nX * slope, size_nX * slope

    def _allowed(
        self, derivative_nX: Tensor, size_nX: Tensor, logp_nX: Tensor, tokens: Tokens
    ) -> Tensor:
        """How far the derivative may be off."""
        growth_n1 = (1 + self._sizes(tokens) * self.largest_norm)[:, None]
        of_float32_nX = FACTOR * (ROUNDOFF * size_nX * (growth_n1 - logp_nX) + SMALLEST)
        return of_float32_nX + tokens.operand_roundoff * derivative_nX.abs()

    def _sizes(self, tokens: Tokens) -> Tensor:
        return tokens.hidden_ND.norm(dim=1) / self.temperature

    def _scaled(self, products: Tensor, rows: Tensor | slice) -> Tensor:
        """Products of hidden states and rows as scaled logits."""
        if self.bias_W is not None:
            products = products + self.bias_W[rows].double()
        if self.softcap:
            products = self.softcap * torch.tanh(products / self.softcap)
        return products / self.temperature

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight_WD), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            yield rows, self.weight_WD[rows].double()

    def _over_shards(
        self, values: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Tensor:
        if self.vocab is not None:
            dist.all_reduce(values, operation, group=self.vocab.group)
        return values
