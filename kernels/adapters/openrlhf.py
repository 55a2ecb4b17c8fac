"""OpenRLHF 0.11.2: log-probs and entropy from logits (openrlhf/models/utils.py), and its PPO and
GSPO loss (openrlhf/models/loss.py).

    from kernels.adapters.openrlhf import PolicyLoss, compute_entropy, log_probs_from_logits

Shape legend: `common.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.adapters.common import (
    loss_from_logprobs,
    masked_mean,
    masked_row_mean,
    row_entropy,
    row_logprobs,
)
from kernels.reference import compute_dtype
from kernels.spec import LossSpec, check_choice

# OpenRLHF bounds log-ratios by this before it exponentiates them.
LOG_RATIO_BOUND = 20.0


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of the labels at a temperature.

    Unlike OpenRLHF's it leaves the caller's logits undivided; code that reads them afterwards has
    to divide by the temperature itself.

    Args:
        logits: [..., V].
        labels: integers [...]; -100 gives 0.
        temperature: above 0.

    Returns:
        [...] float32 (float64 for float64 logits).

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return row_logprobs(logits, labels, temperature=temperature).logprobs


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy [...] in nats of softmax(logits), differentiable; logits [..., V].

    Raises:
        ValueError, TypeError: the logits have no columns or an unknown dtype.
    """
    return row_entropy(logits)


class PolicyLoss(torch.nn.Module):
    """PPO or GSPO loss of log-probs, with the correction for a rollout engine that disagrees."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        """
        Args:
            clip_eps_low, clip_eps_high: the ratio is clipped to [1 - low, 1 + high].
            dual_clip: bound of the ratio where the advantage is negative, above 1; None for none.
            token_level_loss: mean over tokens; False (always with "gspo"): over sequences of the
                mean over their tokens.
            policy_loss_type: "ppo" or "gspo".
            is_correction_level: "off", "token" or "seq" (geometric mean of the sequence).
            is_correction_mode: "mask" drops what lies outside the threshold and weighs the rest
                with exp(old - rollout); "clip" (token level) clamps that weight to it.
            is_correction_gating: "ratio". "binary_kl" and "tv" are not computed.
            is_correction_threshold: lowest and highest ratio.

        Raises:
            ValueError: an option that does not exist or is not computed.
        """
        super().__init__()
        check_choice("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        check_choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        check_choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        if is_correction_level != "off":
            check_choice("is_correction_gating", is_correction_gating, ("ratio",))
        if is_correction_mode == "clip" and is_correction_level == "seq":
            raise ValueError(
                'is_correction_mode: expected "mask" with is_correction_level "seq", got "clip"'
            )
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_threshold = is_correction_threshold
        self.spec = LossSpec(
            ratio_level="sequence" if policy_loss_type == "gspo" else "token",
            clip_low=clip_eps_low,
            clip_high=clip_eps_high,
            dual_clip=dual_clip,
            aggregation=(
                "token_mean" if token_level_loss and policy_loss_type == "ppo" else "sequence_mean"
            ),
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """
        Args:
            log_probs, old_log_probs, advantages, rollout_log_probs: [B, T]; only the first is
                differentiated.
            action_mask: [B, T], True or 1 where a token counts; None: everywhere.
            dp_size: ranks that gradients are averaged over.
            batch_num_tokens, global_batch_size: global counts of tokens and of non-empty sequences;
                None: this batch's.

        Returns:
            Loss; share of clipped tokens; mean of old - new; mean of rollout - old and share of
            tokens (sequences) outside the threshold, both None without correction. All 0-d.

        Raises:
            ValueError: an argument does not fit.
        """
        if self.is_correction_level != "off" and rollout_log_probs is None:
            raise ValueError(
                "rollout_log_probs: expected a tensor with is_correction_level "
                f"{self.is_correction_level!r}, got None"
            )
        mask_BT = torch.ones_like(log_probs) if action_mask is None else action_mask
        weights_BT = rollout_kl = outside = None
        if self.spec.ratio_level == "sequence":
            corrected = self.is_correction_level != "off" and rollout_log_probs is not None
            reference_BT = rollout_log_probs if corrected else old_log_probs
            assert reference_BT is not None
            log_ratio_BT = (log_probs - reference_BT).double()
            ratio = masked_row_mean(log_ratio_BT, mask_BT).exp()
        else:
            log_ratio_BT = (log_probs - old_log_probs).double()
            log_ratio_BT = log_ratio_BT.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            reference_BT, ratio = old_log_probs, log_ratio_BT.exp()
            if self.is_correction_level != "off":
                assert rollout_log_probs is not None
                weights_BT, outside = self._correction(old_log_probs, rollout_log_probs, mask_BT)
                rollout_kl = masked_mean(rollout_log_probs - old_log_probs, mask_BT)
        loss = loss_from_logprobs(
            reference_BT.double() + log_ratio_BT,
            reference_BT,
            advantages,
            mask_BT,
            self.spec,
            weights_BT=weights_BT,
            denominator=self._denominator(mask_BT, dp_size, batch_num_tokens, global_batch_size),
        )
        high_BT = (ratio > 1 + self.spec.clip_high) & (advantages > 0)
        low_BT = (ratio < 1 - self.spec.clip_low) & (advantages < 0)
        clip_ratio = masked_mean((high_BT | low_BT).to(log_probs.dtype), mask_BT)
        drift = masked_mean((old_log_probs - log_probs).detach(), mask_BT)
        return loss.to(compute_dtype(log_probs)), clip_ratio, drift, rollout_kl, outside

    def _correction(
        self, old_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights of the policy term, [B, T], and the share of tokens or sequences outside."""
        low, high = self.is_correction_threshold
        log_weight_BT = (old_BT - rollout_BT).detach()
        weight_BT = log_weight_BT.exp()
        if self.is_correction_level == "seq":
            gate = masked_row_mean(log_weight_BT, mask_BT).exp()
        else:
            gate = weight_BT
        outside = (gate < low) | (gate > high)
        if self.is_correction_level == "seq":
            share = outside.to(old_BT.dtype).mean()
        else:
            share = masked_mean(outside.to(old_BT.dtype), mask_BT)
        if self.is_correction_mode == "clip":
            return weight_BT.clamp(low, high), share
        return torch.where(outside, 0.0, weight_BT), share

    def _denominator(
        self,
        mask_BT: Tensor,
        dp_size: int,
        batch_num_tokens: Tensor | float | None,
        global_batch_size: Tensor | float | None,
    ) -> Tensor | float:
        """The global count, divided by the ranks whose gradients are averaged."""
        by_token = self.spec.aggregation == "token_mean"
        count = batch_num_tokens if by_token else global_batch_size
        if count is not None:
            return count / dp_size
        active_BT = mask_BT.bool()
        return (active_BT if by_token else active_BT.any(dim=-1)).sum().clamp(min=1)
