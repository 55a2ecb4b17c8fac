"""The specification of the policy-gradient head in plain PyTorch, any device, float64-capable.

Two passes over the logits, `row_stats` and `grad_logits`, and between them the token loss:
everything that is O(N). Every other backend is held to this file. Its token loss is also used by
them wherever the loss is not fused into the kernel. The value of a loss is written once, here; its
derivative is taken from that value by autograd, so the two cannot drift apart.

Shapes: N packed tokens, W this rank's columns of the vocabulary, S sequences, logits_OIW a view
[outer, inner, W] of the logits with N = outer * inner. Token ids are local columns; two values are
special: `IGNORED` marks a row outside the loss, `NOT_OWNED` a row whose target lies on another
vocabulary shard.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.spec import LossSpec

IGNORED = -100
NOT_OWNED = -1

METRIC_NAMES = (
    "tokens",  # active tokens
    "entropy",  # mean over active tokens, as all that follow where nothing else is said
    "kl",  # the spec's estimator of KL to the reference (k3 if it has none), 0 without reference
    "kl_old",  # old_logprob - logprob
    "ratio/mean",
    "ratio/min",
    "ratio/max",
    "clip_fraction",
    "clip_fraction/low",  # ratio below the lower clip and advantage negative
    "clip_fraction/high",  # ratio above the upper clip and advantage positive
    "sampler/gap_mean",  # |old_logprob - sampler_logprob|, 0 without sampler log-probs
    "sampler/gap_max",
    "sampler/kept_fraction",  # share of tokens whose policy term no mask removed
    "zero_gradient_fraction",  # share of active tokens whose gradient is exactly zero
    "zero_spread_fraction",  # share of reward groups without spread, 0 for given advantages
)


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


# Passes over the logits


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for everything else."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def scaled_logits(logits_OIW: Tensor, inv_temperature: Tensor | float, softcap: float) -> Tensor:
    """z = inv_temperature * softcap(x), [N, W] in the compute dtype."""
    x_NW = logits_OIW.reshape(-1, logits_OIW.shape[-1]).to(compute_dtype(logits_OIW))
    if softcap > 0:
        x_NW = softcap * torch.tanh(x_NW / softcap)
    if isinstance(inv_temperature, Tensor):
        return x_NW * inv_temperature.to(x_NW.dtype)[:, None]
    return x_NW if inv_temperature == 1.0 else x_NW * inv_temperature


def row_stats(
    logits_OIW: Tensor, token_ids_N: Tensor, inv_temperature: Tensor | float, softcap: float
) -> Tensor:
    """First pass: [4, N] row maximum, sum of exp, weighted sum and target logit.

    m = max_j z_j; s = sum_j exp(z_j - m); w = sum_j (z_j - m) exp(z_j - m); z_y (0 where the target
    is not here). Columns at -inf add nothing. An all -inf row gives m = -inf, s = w = 0; an ignored
    row 0, 1, 0, 0 whatever it holds.
    """
    ignored_N = token_ids_N == IGNORED
    z_NW = scaled_logits(logits_OIW, inv_temperature, softcap)
    z_NW = torch.where(ignored_N[:, None], 0.0, z_NW)
    target_N = z_NW.gather(1, token_ids_N.clamp(min=0)[:, None])[:, 0]
    target_N = torch.where(token_ids_N < 0, 0.0, target_N)
    if len(z_NW) == 1:
        # PyTorch sums a single row in another order than the rows of a batch; two rows keep the
        # bits of a row independent of the batch it is in.
        max_N, sum_N, weighted_N = (value[:1] for value in _row_sums(z_NW.expand(2, -1)))
    else:
        max_N, sum_N, weighted_N = _row_sums(z_NW)
    return torch.stack(
        [
            torch.where(ignored_N, 0.0, max_N),
            torch.where(ignored_N, 1.0, sum_N),
            torch.where(ignored_N, 0.0, weighted_N),
            target_N,
        ]
    )


def _row_sums(z_NW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    max_N = z_NW.amax(dim=1)
    shifted_NW = z_NW - torch.where(max_N == -math.inf, 0.0, max_N)[:, None]
    exp_NW = shifted_NW.exp()
    weighted_NW = torch.where(shifted_NW == -math.inf, 0.0, shifted_NW * exp_NW)
    return max_N, exp_NW.sum(dim=1), weighted_NW.sum(dim=1)


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
    """Second pass: writes d loss / d logits, given the coefficients d loss / d (logprob, entropy).

    With log p_j = z_j - row_max - log_sum,
        d_j = coef_logprob * (1[j=y] - p_j) - coef_entropy * p_j * (log p_j + entropy),
    times the derivative of z_j; 1 - p_y is -expm1(log p_y), so that it survives p_y -> 1. Rows
    whose coefficients are both zero, and ignored rows, are exact zeros. `out_OIW` may be the
    logits themselves.
    """
    z_NW = scaled_logits(logits_OIW, inv_temperature, softcap)
    logp_NW = z_NW - row_max_N[:, None] - log_sum_N[:, None]
    p_NW = logp_NW.exp()
    ids_N1 = token_ids_N.clamp(min=0)[:, None]
    one_minus_p_N1 = -torch.expm1(logp_NW.gather(1, ids_N1))
    grad_NW = -coef_logprob_N[:, None] * p_NW
    target_N1 = torch.where(
        token_ids_N[:, None] >= 0,
        coef_logprob_N[:, None] * one_minus_p_N1,
        grad_NW.gather(1, ids_N1),
    )
    grad_NW.scatter_(1, ids_N1, target_N1)
    surprise_NW = torch.where(p_NW == 0, 0.0, p_NW * (logp_NW + entropy_N[:, None]))
    grad_NW -= coef_entropy_N[:, None] * surprise_NW
    if softcap > 0:
        x_NW = logits_OIW.reshape(z_NW.shape).to(z_NW.dtype)
        grad_NW *= 1 - torch.tanh(x_NW / softcap) ** 2
    if isinstance(inv_temperature, Tensor):
        grad_NW *= inv_temperature.to(grad_NW.dtype)[:, None]
    else:
        grad_NW *= inv_temperature
    zero_N = (token_ids_N == IGNORED) | ((coef_logprob_N == 0) & (coef_entropy_N == 0))
    out_OIW.copy_(grad_NW.masked_fill_(zero_N[:, None], 0.0).view(out_OIW.shape))


def scale_(grad_OIW: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient by a 0-d factor in place."""
    grad_OIW.mul_(factor.to(grad_OIW.dtype))


# Advantages


def group_offsets(num_sequences: int, group_size: int, device: torch.device) -> Tensor:
    """Offsets [P+1] of groups of `group_size` consecutive sequences."""
    return torch.arange(0, num_sequences + 1, group_size, device=device)


def segment_sum(values_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment, [S]; 0 for an empty one. Serial in each segment, hence repeatable."""
    return torch.segment_reduce(values_N, "sum", offsets=offsets, unsafe=True, initial=0.0)


def segment_index(offsets: Tensor, length: int) -> Tensor:
    """For each of `length` positions the index of its segment, without a host sync."""
    positions = torch.arange(length, device=offsets.device)
    return torch.searchsorted(offsets[1:], positions, right=True)


def normalized_advantages(
    rewards_S: Tensor, offsets: Tensor, *, scale: str, ddof: int, eps: float
) -> Tensor:
    """Advantages of sequences sorted by group, float64 [S]; `offsets` [P+1] bounds the groups.

    group: (R - mean) / (std + eps) of the group; batch: centred by group, std of all rewards; none:
    R - mean. Statistics are two-pass. NaN rewards leave the statistics and get advantage 0, and so
    does every group without spread, a group of one included.
    Source: Shao et al. 2024 (2402.03300) section 4.1.2; Liu et al. 2025 (2503.20783) section 3.2.
    """
    rewards_S = rewards_S.double()
    group_S = segment_index(offsets, len(rewards_S))
    valid_S = ~rewards_S.isnan()
    filled_S = torch.where(valid_S, rewards_S, 0.0)
    count_P = segment_sum(valid_S.double(), offsets)
    mean_P = segment_sum(filled_S, offsets) / count_P.clamp(min=1)
    centred_S = torch.where(valid_S, rewards_S - mean_P[group_S], 0.0)
    centred_S = torch.where(has_spread(rewards_S, offsets)[group_S], centred_S, 0.0)
    if scale == "none":
        return centred_S
    if scale == "group":
        squares, count = segment_sum(centred_S**2, offsets)[group_S], count_P[group_S]
    else:
        batch_mean = filled_S.sum() / valid_S.sum().clamp(min=1)
        squares = torch.where(valid_S, (rewards_S - batch_mean) ** 2, 0.0).sum()
        count = valid_S.sum()
    std = (squares / (count - ddof).clamp(min=1)).sqrt()
    return torch.where(centred_S == 0, 0.0, centred_S / (std + eps))


def has_spread(rewards_S: Tensor, offsets: Tensor) -> Tensor:
    """bool [P]: whether the group's rewards, NaN aside, are not all equal."""
    nan_S = rewards_S.isnan()
    highest_P, lowest_P = (
        torch.segment_reduce(
            torch.where(nan_S, fill, rewards_S.double()), reduce, offsets=offsets, unsafe=True
        )
        for reduce, fill in (("max", -math.inf), ("min", math.inf))
    )
    return highest_P > lowest_P


# Token loss


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
        offsets = terms.offsets.new_tensor([0, stop - start])
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
    count: Tensor | float
    if batch.denominator is not None:
        count = batch.denominator
    elif spec.aggregation == "token_mean":
        count = active.sum().clamp(min=1)
    else:
        count = max(len(batch.offsets) - 1, 1)
    if spec.aggregation == "sum":
        return active
    if spec.aggregation == "sequence_mean":
        return active / segment_sum(active, batch.offsets).clamp(min=1)[sequence_N] / count
    if spec.aggregation == "constant":
        assert spec.max_tokens is not None
        return active / spec.max_tokens / count
    return active / count


def token_loss(
    logprobs_N: Tensor, entropy_N: Tensor, terms: TokenTerms, spec: LossSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (0-d) and its derivatives by log-prob and entropy ([N]), all float64."""
    with torch.enable_grad():
        logprobs_N = logprobs_N.detach().double().requires_grad_()
        entropy_N = entropy_N.detach().double().requires_grad_()
        loss = objective(logprobs_N, entropy_N, terms, spec)
    coef_logprob_N, coef_entropy_N = torch.autograd.grad(
        loss, (logprobs_N, entropy_N), materialize_grads=True
    )
    return loss.detach(), coef_logprob_N, coef_entropy_N


def objective(logprobs_N: Tensor, entropy_N: Tensor, terms: TokenTerms, spec: LossSpec) -> Tensor:
    """sum_n weight_n * (sampler weight * policy term + kl_weight * KL - entropy_weight *
    entropy)."""
    log_ratio_N = token_log_ratio(logprobs_N, terms)
    total_N = policy_weight(logprobs_N, terms, spec) * policy_term(
        logprobs_N, log_ratio_N, terms, spec
    )
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
        # Beyond e^30 the gate is 1 to the last bit with slope 0; the bound only avoids inf * 0.
        ratio_N = log_ratio_N.clamp(max=30.0).exp()
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
    Source: truncated and masked importance sampling as in TRL and verl (algorithms of 2025).
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


def loss_metrics(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    coef_logprob_N: Tensor,
    coef_entropy_N: Tensor,
    batch: TokenBatch,
    terms: TokenTerms,
    spec: LossSpec,
) -> Tensor:
    """The values of METRIC_NAMES, float32 [len(METRIC_NAMES)], without a host sync."""
    logprobs_N = logprobs_N.detach().double()
    active_N, advantages_N = terms.active_N, terms.advantages_N
    count = active_N.sum().clamp(min=1)

    def mean(values_N: Tensor) -> Tensor:
        return torch.where(active_N, values_N.double(), 0.0).sum() / count

    def extreme(values_N: Tensor, largest: bool) -> Tensor:
        bound = -math.inf if largest else math.inf
        filled_N = torch.where(active_N, values_N, bound)
        filled_N = torch.cat([filled_N, torch.where(active_N.any(), bound, 0.0)[None]])
        return filled_N.amax() if largest else filled_N.amin()

    token_log_ratio_N = token_log_ratio(logprobs_N, terms)
    log_ratio_N = token_log_ratio_N
    if spec.ratio_level == "sequence":
        log_ratio_N = segment_mean(log_ratio_N, terms)
    ratio_N = log_ratio_N.exp()
    if spec.surrogate in ("clip", "cispo"):
        below_N, above_N = ratio_N < 1 - spec.clip_low, ratio_N > 1 + spec.clip_high
    elif spec.surrogate == "gmpo":
        below_N, above_N = log_ratio_N < -spec.clip_low, log_ratio_N > spec.clip_high
    else:
        below_N = above_N = torch.zeros_like(active_N)
    low_N, high_N = below_N & (advantages_N < 0), above_N & (advantages_N > 0)
    zero = logprobs_N.new_zeros(())
    kl = zero
    if terms.ref_logprobs_N is not None:
        kl = mean(kl_term(logprobs_N, token_log_ratio_N, terms, spec))
    gap_N = torch.zeros_like(logprobs_N)
    if terms.sampler_logprobs_N is not None:
        old_N = logprobs_N if terms.old_logprobs_N is None else terms.old_logprobs_N
        gap_N = sampler_gap(old_N, terms).abs()
    zero_spread = zero
    if batch.rewards_S is not None and len(batch.rewards_S) > 0:
        assert batch.group_size is not None
        offsets = group_offsets(len(batch.rewards_S), batch.group_size, active_N.device)
        zero_spread = (~has_spread(batch.rewards_S, offsets)).double().mean()
    return torch.stack(
        [
            active_N.sum().double(),
            mean(entropy_N),
            kl,
            mean(-token_log_ratio_N),
            mean(ratio_N),
            extreme(ratio_N, largest=False),
            extreme(ratio_N, largest=True),
            mean(low_N | high_N),
            mean(low_N),
            mean(high_N),
            mean(gap_N),
            extreme(gap_N, largest=True),
            mean(policy_weight(logprobs_N, terms, spec) > 0),
            mean((coef_logprob_N == 0) & (coef_entropy_N == 0)),
            zero_spread,
        ]
    ).float()
