"""What tests and benchmarks share: a random GRPO batch and the same loss in plain PyTorch.

`eager_policy_loss` is written the way trainers write it, whole-tensor operations and autograd, and
shares no code with the ops. In float64 it is the truth that errors are measured against; in the
logits' dtype it is the accuracy and the speed to beat. Shape legend: `ops.py`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoBatch:
    """Packed logits and everything a GRPO loss with KL reads besides."""

    logits_NV: Tensor
    token_ids_N: Tensor
    old_logprobs_N: Tensor
    ref_logprobs_N: Tensor
    rewards_S: Tensor
    group_size: int
    cu_seqlens: Tensor


def grpo_batch(
    num_tokens: int,
    width: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    num_sequences: int = 8,
    group_size: int = 4,
    device: str = "cpu",
) -> GrpoBatch:
    """Random batch with ratios on both sides of both clips and rewards of 0 and 1.

    Logits are peaked as a language model's are: the sampled tokens have probabilities from 1e-6 to
    almost 1.
    """
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(num_tokens, width, generator=generator) * 2
    token_ids_N = torch.randint(0, width, (num_tokens,), generator=generator)
    boost_N1 = torch.rand(num_tokens, 1, generator=generator) * 16
    logits_NV.scatter_add_(1, token_ids_N[:, None], boost_N1)
    logits_NV = logits_NV.to(dtype)
    logprobs_N = logits_NV.float().log_softmax(-1).gather(1, token_ids_N[:, None])[:, 0]
    noise_2N = torch.randn(2, num_tokens, generator=generator) * 0.3
    bounds = torch.linspace(0, num_tokens, num_sequences + 1).round().int()
    rewards_S = (torch.arange(num_sequences) % 3 == 0).float()
    return GrpoBatch(
        logits_NV=logits_NV.to(device),
        token_ids_N=token_ids_N.to(device),
        old_logprobs_N=(logprobs_N + noise_2N[0]).to(device),
        ref_logprobs_N=(logprobs_N + noise_2N[1]).to(device),
        rewards_S=rewards_S.to(device),
        group_size=group_size,
        cu_seqlens=bounds.to(device),
    )


def eager_policy_loss(
    logits_NV: Tensor, batch: GrpoBatch, *, clip: float = 0.2, kl_weight: float = 0.04
) -> Tensor:
    """GRPO with k3 (Shao et al. 2024, 2402.03300, equations 3 and 4) in plain PyTorch, 0-d.

    Everything is computed in the dtype of the logits apart from the per-token scalars, which are
    float32, or float64 for float64 logits.
    """
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    logprobs_N = logits_NV.log_softmax(-1).gather(1, batch.token_ids_N[:, None])[:, 0].to(dtype)
    rewards_PG = batch.rewards_S.to(dtype).view(-1, batch.group_size)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    advantages_S = (centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()
    lengths_S = batch.cu_seqlens.diff().long()
    advantages_N = advantages_S.repeat_interleave(lengths_S)
    ratio_N = (logprobs_N - batch.old_logprobs_N.to(dtype)).exp()
    surrogate_N = torch.min(
        ratio_N * advantages_N, ratio_N.clamp(1 - clip, 1 + clip) * advantages_N
    )
    gap_N = batch.ref_logprobs_N.to(dtype) - logprobs_N
    token_loss_N = -surrogate_N + kl_weight * (gap_N.exp() - gap_N - 1)
    weights_N = (1 / (lengths_S.to(dtype) * len(lengths_S))).repeat_interleave(lengths_S)
    return (token_loss_N * weights_N).sum()


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm, computed in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
