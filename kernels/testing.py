"""What tests and benchmarks share: random GRPO batches and the same losses in plain PyTorch.

The eager functions are written the way trainers write them, whole-tensor operations and autograd,
and share no code with the ops. In float64 they are the truth that errors are measured against; in
the logits' dtype they are the accuracy and the speed to beat. Shape legend: `ops.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.backends import available_backends, select_backend
from kernels.spec import LossSpec

GRPO_K3 = LossSpec(kl="k3", kl_weight=0.04)
"""GRPO with KL to the reference (Shao et al. 2024, 2402.03300, equations 3 and 4)."""


def backends_on(device: str) -> list[str]:
    """Names of the backends that compute on tensors of a device in this process."""

    def computes(name: str) -> bool:
        try:
            select_backend(name, torch.device(device), torch.float32)
        except (RuntimeError, ValueError):
            return False
        return True

    return [name for name in available_backends() if computes(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoBatch:
    """Everything a GRPO loss with KL reads besides the logits."""

    token_ids_N: Tensor
    old_logprobs_N: Tensor
    ref_logprobs_N: Tensor
    rewards_S: Tensor
    group_size: int
    cu_seqlens: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoLogits(GrpoBatch):
    """A batch with its packed logits."""

    logits_NV: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoHidden(GrpoBatch):
    """A batch with hidden states and the weight of the LM head."""

    hidden_ND: Tensor
    weight_VD: Tensor


def grpo_batch(
    num_tokens: int,
    width: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    num_sequences: int = 8,
    group_size: int = 4,
    device: str = "cpu",
) -> GrpoLogits:
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
    logprobs_N = eager_logprobs(logits_NV.float(), token_ids_N)
    rollout = _rollout(token_ids_N, logprobs_N, generator, num_sequences, device)
    return GrpoLogits(logits_NV=logits_NV.to(device), group_size=group_size, **rollout)


def grpo_hidden_batch(
    num_tokens: int,
    model_width: int,
    width: int,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    num_sequences: int = 8,
    group_size: int = 4,
    device: str = "cpu",
) -> GrpoHidden:
    """`grpo_batch` from hidden states [N, D]: their logits have the same spread and peaks."""
    generator = torch.Generator().manual_seed(seed)
    weight_VD = torch.randn(width, model_width, generator=generator) * 2 / model_width**0.5
    token_ids_N = torch.randint(0, width, (num_tokens,), generator=generator)
    target_ND = weight_VD[token_ids_N]
    boost_N1 = torch.rand(num_tokens, 1, generator=generator) * 16
    hidden_ND = torch.randn(num_tokens, model_width, generator=generator)
    hidden_ND += boost_N1 * target_ND / target_ND.square().sum(dim=1, keepdim=True)
    hidden_ND, weight_VD = hidden_ND.to(dtype).to(device), weight_VD.to(dtype).to(device)
    token_ids_N = token_ids_N.to(device)
    parts = zip(hidden_ND.split(256), token_ids_N.split(256), strict=True)
    logprobs_N = torch.cat(
        [eager_logprobs(part_ND.float() @ weight_VD.float().t(), ids_N) for part_ND, ids_N in parts]
    )
    rollout = _rollout(token_ids_N, logprobs_N.cpu(), generator, num_sequences, device)
    return GrpoHidden(hidden_ND=hidden_ND, weight_VD=weight_VD, group_size=group_size, **rollout)


def _rollout(
    token_ids_N: Tensor,
    logprobs_N: Tensor,
    generator: torch.Generator,
    num_sequences: int,
    device: str,
) -> dict[str, Any]:
    """What sampler, reference and graders would have said of these tokens."""
    noise_2N = torch.randn(2, len(logprobs_N), generator=generator) * 0.3
    bounds = torch.linspace(0, len(logprobs_N), num_sequences + 1).round().int()
    rewards_S = (torch.arange(num_sequences) % 3 == 0).float()
    return {
        "token_ids_N": token_ids_N.to(device),
        "old_logprobs_N": (logprobs_N + noise_2N[0]).to(device),
        "ref_logprobs_N": (logprobs_N + noise_2N[1]).to(device),
        "rewards_S": rewards_S.to(device),
        "cu_seqlens": bounds.to(device),
    }


def eager_logprobs(logits_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    """Log-probabilities of the tokens, [N], in the dtype of the logits."""
    return logits_NV.log_softmax(-1).gather(1, token_ids_N[:, None])[:, 0]


def eager_logprobs_and_entropy(logits_NV: Tensor, token_ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens and entropy in nats, each [N], in the dtype of the logits."""
    logprobs_NV = logits_NV.log_softmax(-1)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    return logprobs_NV.gather(1, token_ids_N[:, None])[:, 0], entropy_N


def eager_advantages(rewards_S: Tensor, group_size: int) -> Tensor:
    """(R - mean) / (std + 1e-4) over consecutive groups, [S]."""
    rewards_PG = rewards_S.view(-1, group_size)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return (centred_PG / (rewards_PG.std(1, keepdim=True) + 1e-4)).flatten()


def eager_policy_loss(logits_NV: Tensor, batch: GrpoBatch, spec: LossSpec = GRPO_K3) -> Tensor:
    """`eager_loss` of logits [N, V], whose log-probs are computed in their own dtype."""
    if spec.entropy_weight == 0:
        return eager_loss(eager_logprobs(logits_NV, batch.token_ids_N), None, batch, spec)
    return eager_loss(*eager_logprobs_and_entropy(logits_NV, batch.token_ids_N), batch, spec)


def eager_loss(
    logprobs_N: Tensor, entropy_N: Tensor | None, batch: GrpoBatch, spec: LossSpec
) -> Tensor:
    """GRPO (Shao et al. 2024, 2402.03300, equations 3 and 4) or GSPO (Zheng et al. 2025,
    2507.18071, equation 5) in plain PyTorch, 0-d.

    Scalars a token are float32, or float64 for float64 log-probs. Of `spec` the clip range, the
    level of the ratio, KL weight (k3) and entropy weight are read.
    """
    dtype = torch.float64 if logprobs_N.dtype == torch.float64 else torch.float32
    logprobs_N = logprobs_N.to(dtype)
    lengths_S = batch.cu_seqlens.diff().long()
    num_tokens, num_sequences = len(logprobs_N), len(lengths_S)
    sequence_N = torch.arange(num_sequences, device=logprobs_N.device).repeat_interleave(
        lengths_S, output_size=num_tokens
    )
    advantages_N = eager_advantages(batch.rewards_S.to(dtype), batch.group_size)[sequence_N]
    log_ratio_N = logprobs_N - batch.old_logprobs_N.to(dtype)
    if spec.ratio_level == "sequence":
        sum_S = log_ratio_N.new_zeros(num_sequences).index_add(0, sequence_N, log_ratio_N)
        log_ratio_N = (sum_S / lengths_S)[sequence_N]
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - spec.clip_low, 1 + spec.clip_high)
    token_loss_N = -torch.min(ratio_N * advantages_N, clipped_N * advantages_N)
    if spec.kl == "k3":
        gap_N = batch.ref_logprobs_N.to(dtype) - logprobs_N
        token_loss_N = token_loss_N + spec.kl_weight * (gap_N.exp() - gap_N - 1)
    if entropy_N is not None:
        token_loss_N = token_loss_N - spec.entropy_weight * entropy_N.to(dtype)
    weights_S = 1 / (lengths_S.to(dtype) * num_sequences)
    return (token_loss_N * weights_S[sequence_N]).sum()


def logits_with_logprobs(logprobs: list[float], width: int, dtype: torch.dtype) -> Tensor:
    """Random logits [N, width] whose column 0 has the given log-probs, all of them below 0."""
    logprobs_N = torch.tensor(logprobs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    logits_NV = torch.randn(len(logprobs), width, generator=generator, dtype=torch.float64)
    rest_N = logits_NV[:, 1:].logsumexp(1)
    logits_NV[:, 0] = rest_N + logprobs_N - torch.log(-torch.expm1(logprobs_N))
    return logits_NV.to(dtype)


def eager_token_values(
    logits_NV: Tensor,
    token_ids_N: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`eager_logprobs_and_entropy` of scaled and capped logits, which may hold -inf."""
    z_NV = softcap * torch.tanh(logits_NV / softcap) if softcap else logits_NV
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z_NV.dtype)[:, None]
    logp_NV = (z_NV / temperature).log_softmax(-1)
    p_NV = logp_NV.exp()
    # log p is -inf where p is 0; the product there is 0, and so is its gradient.
    entropy_N = -(p_NV * logp_NV.masked_fill(p_NV == 0, 0.0)).sum(-1)
    return logp_NV.gather(1, token_ids_N[:, None])[:, 0], entropy_N


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Euclidean norm, computed in float64."""
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())
