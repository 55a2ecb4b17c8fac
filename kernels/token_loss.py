"""The policy-gradient loss of tokens whose log-probs are known: everything that is O(N).

The value of a loss is written once, in `objective`; its derivative is taken from that value by
autograd, so the two cannot drift apart. Every backend uses this file wherever it does not fuse the
loss into its kernel, and is held to it where it does.

Shapes: N packed tokens, S sequences. Results are float64.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.advantages import (
    group_offsets,
    normalized_advantages,
    segment_index,
    segment_sum,
)
from kernels.reference import IGNORED
from kernels.spec import LossSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What the loss reads besides the logits. Logprob tensors are [N], None where not given."""

    token_ids_N: Tensor
    """int64 local columns, IGNORED or NOT_OWNED."""
    offsets: Tensor
    """int64 [S+1]; sequence i holds tokens offsets[i] to offsets[i+1]."""
    old_logprobs_N: Tensor | None = None
    ref_logprobs_N: Tensor | None = None
    sampler_logprobs_N: Tensor | None = None
    advantages_N: Tensor | None = None
    rewards_S: Tensor | None = None
    """Raw rewards, normalised within groups of `group_size` consecutive sequences."""
    group_size: int | None = None
    denominator: Tensor | float | None = None
    """Global token count (token_mean) or sequence count that replaces this batch's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """A `TokenBatch` resolved to per-token float64 values, ignored slots neutral."""

    active_N: Tensor
    sequence_N: Tensor
    """Index of the token's sequence."""
    offsets: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    """Aggregation weight: loss = sum(weights * token loss); 0 for ignored tokens."""
    old_logprobs_N: Tensor | None
    ref_logprobs_N: Tensor | None
    sampler_logprobs_N: Tensor | None
    sampler_weight_N: Tensor | None = None
    """Sampler correction where it is known before the log-probs are, that is off-policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLoss:
    """What a fused backend returns besides the gradient it writes; float32 on the logits'
    device."""

    loss: Tensor
    logprobs_N: Tensor
    entropy_N: Tensor
    metrics: Tensor
    """[len(METRIC_NAMES)]."""


def tokens_are_independent(spec: LossSpec, *, on_policy: bool) -> bool:
    """Whether a token's gradient follows from its own log-prob and values known beforehand.

    Only such losses can be computed in one pass over the logits, or over chunks cut anywhere.
    """
    sampler_weight_needs_logprobs = spec.sampler_correction.startswith("sequence_") and on_policy
    return not (spec.couples_tokens or sampler_weight_needs_logprobs)


def token_terms(batch: TokenBatch, spec: LossSpec) -> TokenTerms:
    """Resolves rewards, masks and the aggregation to per-token values."""
    active_N = batch.token_ids_N != IGNORED
    num_tokens, num_sequences = len(active_N), len(batch.offsets) - 1
    sequence_N = segment_index(batch.offsets, num_tokens)
    if batch.rewards_S is not None:
        assert batch.group_size is not None
        advantages = normalized_advantages(
            batch.rewards_S,
            group_offsets(num_sequences, batch.group_size, active_N.device),
            scale=spec.advantage_scale,
            ddof=spec.advantage_ddof,
            eps=spec.advantage_eps,
        )[sequence_N]
    else:
        assert batch.advantages_N is not None
        advantages = batch.advantages_N.double()

    def neutral(logprobs_N: Tensor | None) -> Tensor | None:
        return None if logprobs_N is None else torch.where(active_N, logprobs_N.double(), 0.0)

    terms = TokenTerms(
        active_N=active_N,
        sequence_N=sequence_N,
        offsets=batch.offsets,
        advantages_N=torch.where(active_N, advantages, 0.0),
        weights_N=aggregation_weights(active_N, sequence_N, batch, spec),
        old_logprobs_N=neutral(batch.old_logprobs_N),
        ref_logprobs_N=neutral(batch.ref_logprobs_N),
        sampler_logprobs_N=neutral(batch.sampler_logprobs_N),
    )
    if spec.sampler_correction == "none" or terms.old_logprobs_N is None:
        return terms
    return replace(terms, sampler_weight_N=sampler_weight(terms.old_logprobs_N, terms, spec))


def slice_terms(terms: TokenTerms, start: int, stop: int, sequences: slice | None) -> TokenTerms:
    """The terms of tokens start to stop. `sequences` are the whole sequences these tokens form;
    None where tokens are independent and a cut may fall anywhere."""

    def cut(values_N: Tensor | None) -> Tensor | None:
        return None if values_N is None else values_N[start:stop]

    if sequences is None:
        offsets = torch.arange(2, device=terms.offsets.device) * (stop - start)
        sequence_N = torch.zeros_like(terms.sequence_N[start:stop])
    else:
        offsets = terms.offsets[sequences.start : sequences.stop + 1] - start
        sequence_N = terms.sequence_N[start:stop] - sequences.start
    return TokenTerms(
        active_N=terms.active_N[start:stop],
        sequence_N=sequence_N,
        offsets=offsets,
        advantages_N=terms.advantages_N[start:stop],
        weights_N=terms.weights_N[start:stop],
        old_logprobs_N=cut(terms.old_logprobs_N),
        ref_logprobs_N=cut(terms.ref_logprobs_N),
        sampler_logprobs_N=cut(terms.sampler_logprobs_N),
        sampler_weight_N=cut(terms.sampler_weight_N),
    )


def aggregation_weights(
    active_N: Tensor, sequence_N: Tensor, batch: TokenBatch, spec: LossSpec
) -> Tensor:
    """Weights with loss = sum(weights * token loss), float64 [N].

    sequence_mean 1/(len_i S), token_mean 1/N, sequence_sum 1/S, constant 1/(S max_tokens), sum 1;
    S counts every sequence, also one without active tokens. Source: algorithms in the papers named
    in `spec.PRESETS`; "constant" is Liu et al. 2025 (2503.20783), listing 1.
    """
    active = active_N.double()
    count = aggregation_count(active_N, batch, spec)
    if spec.aggregation == "sum":
        return active
    if spec.aggregation == "sequence_mean":
        return active / segment_sum(active, batch.offsets).clamp(min=1)[sequence_N] / count
    if spec.aggregation == "constant":
        assert spec.max_tokens is not None
        return active / spec.max_tokens / count
    return active / count


def aggregation_count(active_N: Tensor, batch: TokenBatch, spec: LossSpec) -> Tensor | float:
    """The number of tokens (token_mean) or sequences that a loss is a mean over."""
    if batch.denominator is not None:
        return batch.denominator
    if spec.aggregation == "token_mean":
        return active_N.sum().clamp(min=1)
    return max(len(batch.offsets) - 1, 1)


def with_unit_weights(batch: TokenBatch, spec: LossSpec) -> tuple[TokenBatch, Tensor]:
    """The batch with its largest aggregation weight brought into [1, 2), and the power of two that
    takes losses and gradients back, 0-d float64."""
    active_N = batch.token_ids_N != IGNORED
    sequence_N = segment_index(batch.offsets, len(active_N))
    weights_N = aggregation_weights(active_N, sequence_N, batch, spec)
    largest = torch.cat([weights_N, weights_N.new_zeros(1)]).amax()
    unit = torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)
    if spec.aggregation == "sum":
        return batch, torch.ones_like(unit)
    return replace(batch, denominator=aggregation_count(active_N, batch, spec) * unit), unit


def loss_and_derivatives(
    logprobs_N: Tensor, entropy_N: Tensor, terms: TokenTerms, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (0-d) and its derivatives by log-prob and entropy ([N]), all float64."""
    with recording_gradients():
        logprobs_N = logprobs_N.detach().double().requires_grad_()
        entropy_N = entropy_N.detach().double().requires_grad_()
        loss = objective(logprobs_N, entropy_N, terms, spec)
        coef_logprob_N, coef_entropy_N = torch.autograd.grad(
            loss, (logprobs_N, entropy_N), materialize_grads=True
        )
    return loss.detach(), coef_logprob_N, coef_entropy_N


@contextmanager
def recording_gradients() -> Iterator[None]:
    """Gradient mode, also inside a custom op, whose body runs with autograd's dispatch shut off."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def objective(logprobs_N: Tensor, entropy_N: Tensor, terms: TokenTerms, spec: LossSpec) -> Tensor:
    """sum_n weight_n * (sampler weight * policy term + kl_weight * KL - entropy_weight *
    entropy)."""
    log_ratio_N = token_log_ratio(logprobs_N, terms)
    policy_weight_N = policy_weight(logprobs_N, terms, spec)
    if spec.surrogate != "gmpo":
        # A dropped token's ratio may overflow, and 0 * inf is NaN; without an advantage it is 0.
        # GMPO's ratio belongs to the whole sequence, dropped tokens included.
        kept_N = torch.where(policy_weight_N == 0, 0.0, terms.advantages_N)
        terms = replace(terms, advantages_N=kept_N)
    total_N = policy_weight_N * policy_term(logprobs_N, log_ratio_N, terms, spec)
    if spec.kl_weight != 0:
        total_N = total_N + spec.kl_weight * kl_term(logprobs_N, log_ratio_N, terms, spec)
    if spec.entropy_weight != 0:
        total_N = total_N - spec.entropy_weight * entropy_N
    return (terms.weights_N * torch.where(terms.active_N, total_N, 0.0)).sum()


def token_log_ratio(logprobs_N: Tensor, terms: TokenTerms) -> Tensor:
    """log r per token, 0 at ignored tokens; on-policy (no old log-probs) 0 with gradient 1."""
    old_N = logprobs_N.detach() if terms.old_logprobs_N is None else terms.old_logprobs_N
    # A token that had no probability before has no ratio: it counts as unchanged, not as NaN.
    return torch.where(terms.active_N & (old_N != -math.inf), logprobs_N - old_N, 0.0)


def segment_mean(values_N: Tensor, terms: TokenTerms) -> Tensor:
    """Mean over the active tokens of each sequence, handed back to every token, [N]."""
    count_S = segment_sum(terms.active_N.double(), terms.offsets).clamp(min=1)
    return (segment_sum(values_N, terms.offsets) / count_S)[terms.sequence_N]


def choose(condition_N: Tensor, yes: float, no: float) -> Tensor:
    """`torch.where` of two numbers in float64; of itself it would round them to float32."""
    return torch.full_like(condition_N, no, dtype=torch.float64).masked_fill(condition_N, yes)


def policy_term(
    logprobs_N: Tensor, log_ratio_N: Tensor, terms: TokenTerms, spec: LossSpec
) -> Tensor:
    """The surrogate per token, [N]; sources in `spec.PRESETS`.

    clip       -A clamp(r)            see `clamped_ratio`
    sapo       -A (4/tau) sigmoid(tau (r - 1))
    cispo      -A sg[clamp(r, 1 - clip_low, 1 + clip_high)] logprob
    gmpo       -A exp(mean_t z_t)     z the log-ratio, clipped on the side that A pushes to
    vespo      -A sg[phi(W)] logprob  W = prod_t r_t, log phi = lambda + k log W - lambda W
    reinforce  -A logprob
    """
    advantages_N = terms.advantages_N
    if spec.ratio_level == "sequence":
        log_ratio_N = segment_mean(log_ratio_N, terms)
    if spec.surrogate == "clip":
        return -advantages_N * clamped_ratio(log_ratio_N, advantages_N, spec)
    if spec.surrogate == "sapo":
        tau_N = choose(advantages_N > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
        # Beyond e^30 the gate is 1 to the last bit with slope 0; the bound only avoids inf * 0. The
        # gradient of `clamp` would be 0 for NaN.
        ratio_N = torch.where(log_ratio_N > 30.0, 30.0, log_ratio_N).exp()
        return -advantages_N * torch.sigmoid(tau_N * (ratio_N - 1)) * 4 / tau_N
    if spec.surrogate == "gmpo":
        above_N = (advantages_N > 0) & (log_ratio_N > spec.clip_high)
        below_N = (advantages_N < 0) & (log_ratio_N < -spec.clip_low)
        z_N = torch.where(
            above_N, spec.clip_high, torch.where(below_N, -spec.clip_low, log_ratio_N)
        )
        z_N = torch.where(advantages_N == 0, 0.0, z_N)
        return -advantages_N * segment_mean(z_N, terms).exp()
    if spec.surrogate == "cispo":
        weight_N = log_ratio_N.detach().exp().clamp(1 - spec.clip_low, 1 + spec.clip_high)
    elif spec.surrogate == "vespo":
        weight_N = vespo_weight(log_ratio_N.detach(), terms)
    else:
        weight_N = torch.ones_like(logprobs_N)
    return torch.where(advantages_N == 0, 0.0, -weight_N * advantages_N * logprobs_N)


def clamped_ratio(log_ratio_N: Tensor, advantages_N: Tensor, spec: LossSpec) -> Tensor:
    """The ratio, bounded on the side where the bound lowers the objective.

    A > 0: r <= min(1 + clip_high, ratio_cap); A < 0: 1 - clip_low <= r <= min(dual_clip,
    ratio_cap). This is -min(r A, clamp(r) A) and its dual-clip and two-sided forms, divided by -A.
    At a bound the gradient is exactly 0, also where r overflows.
    """
    cap = math.inf if spec.ratio_cap is None else spec.ratio_cap
    dual = math.inf if spec.dual_clip is None else spec.dual_clip
    upper_N = choose(advantages_N > 0, min(1 + spec.clip_high, cap), min(dual, cap))
    lower_N = choose(advantages_N < 0, 1 - spec.clip_low, -math.inf)
    ratio_N = log_ratio_N.detach().exp()
    above_N, below_N = ratio_N > upper_N, ratio_N < lower_N
    free_N = ~(above_N | below_N | (advantages_N == 0))
    ratio_N = torch.where(free_N, log_ratio_N, 0.0).exp()
    return torch.where(above_N, upper_N, torch.where(below_N, lower_N, ratio_N))


def vespo_weight(log_ratio_N: Tensor, terms: TokenTerms) -> Tensor:
    """phi(W) of VESPO (2602.10693) per token; log-ratios clamped to 20 in size, log W to
    1e-8..e^20."""
    log_w_S = segment_sum(log_ratio_N.clamp(-20, 20), terms.offsets).clamp(math.log(1e-8), 20.0)
    log_w_N = log_w_S[terms.sequence_N]
    rising_N = terms.advantages_N >= 0
    k_N, lambda_N = choose(rising_N, 2.0, 3.0), choose(rising_N, 3.0, 2.0)
    return (lambda_N + k_N * log_w_N - lambda_N * log_w_N.exp()).exp()


def kl_term(logprobs_N: Tensor, log_ratio_N: Tensor, terms: TokenTerms, spec: LossSpec) -> Tensor:
    """KL(policy || reference) estimated on the sampled token, [N], with u = ref - logprob.

    k1 = -u, k2 = u^2 / 2, k3 = expm1(u) - u (Schulman 2020); times the ratio, gradient through
    both, if `kl_ratio_weighted` (DeepSeek-V3.2, 2512.02556, equation 7).
    """
    assert terms.ref_logprobs_N is not None
    u_N = terms.ref_logprobs_N - logprobs_N
    if spec.kl == "k1":
        kl_N = -u_N
    elif spec.kl == "k2":
        kl_N = u_N**2 / 2
    else:
        kl_N = torch.expm1(u_N) - u_N
    return kl_N * log_ratio_N.exp() if spec.kl_ratio_weighted else kl_N


def policy_weight(logprobs_N: Tensor, terms: TokenTerms, spec: LossSpec) -> Tensor:
    """Detached weight of the policy term, [N]: sampler correction times off-policy mask.

    The off-policy mask drops sequences with A < 0 and mean(sampler - logprob) above its threshold
    (DeepSeek-V3.2, 2512.02556, equations 8 and 9).
    """
    logprobs_N = logprobs_N.detach()
    weight_N = torch.ones_like(logprobs_N)
    if terms.sampler_weight_N is not None:
        weight_N = terms.sampler_weight_N
    elif spec.sampler_correction != "none":
        weight_N = sampler_weight(logprobs_N, terms, spec)
    if spec.off_policy_threshold is not None:
        drift_N = segment_mean(-sampler_gap(logprobs_N, terms), terms)
        dropped_N = (terms.advantages_N < 0) & (drift_N > spec.off_policy_threshold)
        weight_N = torch.where(dropped_N, 0.0, weight_N)
    return weight_N


def sampler_weight(old_logprobs_N: Tensor, terms: TokenTerms, spec: LossSpec) -> Tensor:
    """Importance weight rho = exp(old - sampler) of the sampler correction, [N].

    truncate: min(rho, high); mask: rho where low <= rho <= high, else 0; sequence modes use the
    product of rho over the sequence. A NaN sampler log-prob counts as rho = 1.
    Source: the vLLM importance sampling modes of TRL 1.16; verl's rollout correction.
    """
    log_rho_N = sampler_gap(old_logprobs_N, terms)
    if spec.sampler_correction.startswith("sequence_"):
        log_rho_N = segment_sum(log_rho_N, terms.offsets)[terms.sequence_N]
    rho_N = log_rho_N.exp()
    high = math.inf if spec.sampler_high is None else spec.sampler_high
    if spec.sampler_correction.endswith("_truncate"):
        return rho_N.clamp(max=high)
    low = 0.0 if spec.sampler_low is None else spec.sampler_low
    return torch.where((rho_N >= low) & (rho_N <= high), rho_N, 0.0)


def sampler_gap(logprobs_N: Tensor, terms: TokenTerms) -> Tensor:
    """logprobs - sampler log-probs, [N]; 0 at ignored tokens and where the sampler gave NaN."""
    assert terms.sampler_logprobs_N is not None
    gap_N = logprobs_N - terms.sampler_logprobs_N
    return torch.where(terms.active_N & ~terms.sampler_logprobs_N.isnan(), gap_N, 0.0)
